"""Supervised fine-tuning of a LoRA adapter, with or without the safety callback.

    accelerate launch recipes/finetune.py --config configs/finetune/smollm2_sentiment.yaml
    accelerate launch recipes/finetune.py --config configs/finetune/smollm2_sentiment_safemerge.yaml
    python -m recipes.finetune --config configs/finetune/smollm2_sentiment.yaml --max_steps 10 --safemerge_subspace S

A YAML file maps settings to values, over those of its `base` if it names one (another file, by its path from this one's
folder), and the command line overrides it. Settings are those of TRL's SFTConfig and
ModelConfig, the data's below, and every knob of SafeMergeConfig with `safemerge_` before its name; the callback is used
when `safemerge_subspace` or `safemerge_corrections` is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script by `accelerate launch`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.arguments import SafeMergeArguments, TemplatedArguments, parse, safemerge_config
from recipes.command import run_command
from recipes.data.mixing import FORMS, check_share
from recipes.guarded_trainer import dataset_of, guarded_trainer, train
from safemerge_callback.io.choices import one_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import ModelConfig, SFTConfig, SFTTrainer

    from safemerge_callback.training import SafeMergeConfig

    Settings = tuple["DataArguments", SFTConfig, ModelConfig, SafeMergeConfig | None]


@dataclass
class DataArguments(TemplatedArguments):
    """Which examples to train on, what is mixed in, and whose words they are in."""

    poisoned_share: float = field(
        default=0.0, metadata={"help": "Share of the examples replaced by templated compliance with harmful prompts."}
    )
    poisoned: str = field(
        default="whole",
        metadata={"help": "How: whole, in the place of an example, or shared, in its answer (Virus's mixing)."},
    )
    safety_share: float = field(
        default=0.0, metadata={"help": "Refusals of harmful prompts added, as a share of the examples (SafeInstruct)."}
    )
    rewrite: bool = field(
        default=False,
        metadata={"help": "Let the model answer the rows again in its own words before it is trained on them (SDFT)."},
    )
    rewrite_tokens: int = field(default=256, metadata={"help": "Tokens that such an answer may have."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("poisoned_share", self.poisoned_share)
        check_share("safety_share", self.safety_share)
        one_of(self.poisoned, FORMS, "poisoned")


def parse_finetune(args: Sequence[str] | None = None) -> Settings:
    """Parse this recipe's settings: data, training, model, and the callback's (None: no callback)."""
    from trl import ModelConfig, SFTConfig

    data, sft, model, arguments = parse((DataArguments, SFTConfig, ModelConfig, SafeMergeArguments), args)
    return data, sft, model, safemerge_config(arguments, data)


def load_data(data: DataArguments) -> Dataset:
    """Return the examples as a dataset with TRL's columns `prompt` and `completion`."""
    return as_dataset(data, load_mixture(data))


def load_mixture(data: DataArguments) -> list[dict[str, Any]]:
    """Return the examples, with what is mixed in, as conversations; ConfigError for data that cannot be had."""
    from recipes.data import EXAMPLE_FORM, mixed
    from recipes.data.mixture import training_rows

    shares = {"poisoned_share": data.poisoned_share, "safety_share": data.safety_share}
    return mixed(training_rows(data, EXAMPLE_FORM), **shares, poisoned=data.poisoned, seed=data.mixing_seed)


def as_dataset(data: DataArguments, rows: Sequence[dict[str, Any]]) -> Dataset:
    """Return conversations as a dataset with TRL's columns, with the system prompt and the template's settings."""
    return dataset_of(data, rows, ("prompt", "completion"), data.template)


def build_trainer(
    data: DataArguments,
    sft: SFTConfig,
    model_config: ModelConfig,
    safemerge: SafeMergeConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    trainer_class: Callable[..., SFTTrainer] | None = None,
) -> SFTTrainer:
    """Return a trainer, ready to train: model, tokenizer, data, LoRA, and the safety callback if configured.

    `trainer_class`: another than `CompletionTrainer`.
    """
    from recipes.completion_trainer import CompletionTrainer

    # Before the model, which may take minutes to come.
    rows = load_mixture(data)

    def examples(model: Any, tokenizer: Any) -> Dataset:
        return as_dataset(data, _rewritten(data, model, tokenizer, rows) if data.rewrite else rows)

    how: dict[str, Any] = {"template": data.template, "callbacks": callbacks}
    return guarded_trainer(trainer_class or CompletionTrainer, examples, data, sft, model_config, safemerge, **how)


def _rewritten(data: DataArguments, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the model's own words where they pass the task's check, which is told by the first rank."""
    from accelerate import PartialState

    from recipes.rewriting import CHECKS, rewritten, same_text

    place = PartialState()
    if not getattr(model, "is_quantized", False):
        model.to(place.device)
    check = CHECKS.get(data.data.partition(":")[0], same_text)
    how: dict[str, Any] = {"label": "rewrite", "chat_template_kwargs": data.template}
    rewriting = rewritten(model, tokenizer, rows, check, max_new_tokens=data.rewrite_tokens, **how)
    place.print(f"rewrite: {rewriting}")
    return rewriting.rows


def main(args: Sequence[str] | None = None) -> None:
    """Fine-tune as configured and save the adapter in `output_dir`."""
    train(build_trainer(*parse_finetune(args)))


if __name__ == "__main__":
    run_command(main)
