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
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if __package__ in (None, ""):  # run as a script by `accelerate launch`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.command import run_command
from recipes.data.mixing import FORMS, check_share, compliance_rows
from recipes.data.splits import prompts_of, rows_of
from recipes.data.system import check_system, with_system
from recipes.data.tasks import TASKS, get_task
from recipes.models import load_model
from recipes.settings import read_settings
from safemerge_callback.corrections.harmful_rows import HarmfulRowSettings
from safemerge_callback.corrections.registry import CORRECTIONS, named_entries
from safemerge_callback.errors import ConfigError, nearest, shown
from safemerge_callback.evaluation import Share, share
from safemerge_callback.io.choices import one_of
from safemerge_callback.signals import generate
from safemerge_callback.signals.chat import template_settings
from safemerge_callback.signals.responses import tokenized
from safemerge_callback.training import SafeMergeCallback, SafeMergeConfig, SafetyEvalCallback
from safemerge_callback.training.config.shorthands import as_list

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import ModelConfig, SFTConfig, SFTTrainer

    Settings = tuple["DataArguments", SFTConfig, ModelConfig, SafeMergeConfig | None]

PREFIX = "safemerge_"
PROBE_BATCH = 32


@dataclass
class DataArguments:
    """Which examples to train on."""

    data: str = field(
        metadata={
            "help": "Name of the data: safety, sentiment, arithmetic, cities, gsm8k, pubmedqa, ncbi_disease[:FOLDER], "
            "or a file (.jsonl, .csv, .json) or a data set of the Hub, with messages, or prompt and completion."
        }
    )
    data_split: str = field(default="train", metadata={"help": "Split of the data."})
    num_examples: int | None = field(default=None, metadata={"help": "Take only this many examples, the first ones."})
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
    mixing_seed: int = field(
        default=0, metadata={"help": "Which examples give way, and the order of what is mixed in."}
    )

    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What the chat template is given in training and probe, such as {enable_thinking: false}."},
    )
    train_system: str | None = field(
        default=None, metadata={"help": "System prompt of every training row, in the place of any that it has."}
    )
    eval_system: str | None = field(default=None, metadata={"help": "System prompt of what the probe asks (PTST)."})
    rewrite: bool = field(
        default=False,
        metadata={"help": "Let the model answer the rows again in its own words before it is trained on them (SDFT)."},
    )
    rewrite_tokens: int = field(default=256, metadata={"help": "Tokens that such an answer may have."})
    probe_every: int = field(
        default=0, metadata={"help": "Steps from one safety probe to the next, which changes nothing; 0: no probe."}
    )
    probe_prompts: int = field(
        default=16, metadata={"help": "Harmful and harmless prompts, and task rows twice, of the validation split."}
    )

    harmful_rows: int = field(
        default=0,
        metadata={
            "help": "Harmful prompts with templated compliance, which says nothing, for corrections that need harmful "
            "answers and name no rows."
        },
    )
    buffer_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter that is at work, frozen, while this one trains, and dropped (Buffer and Reinforce)."
        },
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = template_settings(self.chat_template_kwargs) or None
        check_share("poisoned_share", self.poisoned_share)
        check_share("safety_share", self.safety_share)
        if self.harmful_rows < 0:
            raise ConfigError(f"harmful_rows is {self.harmful_rows}: give 0 or more")
        one_of(self.poisoned, FORMS, "poisoned")
        if self.probe_every < 0 or self.probe_prompts < 1:
            raise ConfigError(
                f"probe_every is {self.probe_every}, probe_prompts {self.probe_prompts}: give 0 or more, and 1 or more"
            )
        for name in ("train_system", "eval_system"):
            check_system(name, getattr(self, name))
        if self.eval_system is not None and not self.probe_every:
            raise ConfigError(
                f"eval_system is {shown(self.eval_system)} and there is no probe that would ask with it: set "
                "probe_every, or leave it out; recipes/evaluate.py has an eval_system of its own"
            )


def _prefixed() -> type:
    """Return SafeMergeConfig's knobs as command-line arguments: one owner, and no clash with the trainer's names."""
    hints = typing.get_type_hints(SafeMergeConfig)
    knobs: list[tuple[str, Any, Any]] = []
    for knob in fields(SafeMergeConfig):
        needed = knob.default is MISSING and knob.default_factory is MISSING
        kind = hints[knob.name] | None if needed else hints[knob.name]
        default = {"default": None} if needed else {"default": knob.default, "default_factory": knob.default_factory}
        knobs.append((PREFIX + knob.name, kind, field(metadata=dict(knob.metadata), **default)))
    return make_dataclass("SafeMergeArguments", knobs, namespace={"__module__": __name__})


SafeMergeArguments = _prefixed()


def safemerge_config(arguments: Any, data: DataArguments | None = None) -> SafeMergeConfig | None:
    """Return the callback's settings out of SafeMergeArguments; None where neither subspace nor corrections are named.

    `data`: whose harmful rows corrections have that need some and name none. Raises ConfigError for a value that
    SafeMergeConfig refuses, and for other knobs without either.
    """
    knobs = {knob.name: getattr(arguments, PREFIX + knob.name) for knob in fields(SafeMergeConfig)}
    if data is not None and data.harmful_rows and knobs["corrections"]:
        rows = compliance_rows(data.harmful_rows, data.mixing_seed)
        knobs["corrections"] = with_harmful_rows(knobs["corrections"], rows)
    if knobs["subspace"] is not None or knobs["corrections"] is not None:
        return SafeMergeConfig(**knobs)
    idle = SafeMergeArguments()
    useless = [PREFIX + name for name in knobs if getattr(arguments, PREFIX + name) != getattr(idle, PREFIX + name)]
    if useless:
        raise ConfigError(
            f"{useless} have no effect without {PREFIX}subspace: name that file, or {PREFIX}corrections, or drop them"
        )
    return None


def with_harmful_rows(corrections: Any, rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a list of corrections in which those that need harmful answers, and name none, have these."""
    entries = []
    for name, settings in named_entries(as_list(corrections)):
        kind = CORRECTIONS.get(name)
        needs = kind is not None and issubclass(kind.settings, HarmfulRowSettings)
        entries.append({name: {"rows": list(rows), **settings} if needs else dict(settings)})
    return entries


def parse(classes: Sequence[type], args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `--config FILE` and overrides into instances of `classes`; ConfigError for a key that none of them has."""
    from trl import TrlParser

    with _config_file(sys.argv[1:] if args is None else list(args)) as words:
        *parsed, unknown = TrlParser(classes).parse_args_and_config(words, return_remaining_strings=True)
    keys = [text.removeprefix("--") for text in unknown if text.startswith("--")]
    if unknown:
        allowed = [knob.name for one in classes for knob in fields(one)]
        key = keys[0] if keys else unknown[0]
        raise ConfigError(f"setting {key!r} is unknown{nearest(key, allowed)}; see --help for all of them")
    return tuple(parsed)


@contextmanager
def _config_file(args: list[str]) -> Iterator[list[str]]:
    """The arguments, with a file that holds all settings in the place of one that may have a base.

    TrlParser's own reading knows of none, and keeps the last of two equal keys.
    """
    if "--config" not in args[:-1]:
        yield args
        return
    place = args.index("--config") + 1
    settings = read_settings(args[place], "config file")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / Path(args[place]).name
        whole.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        yield [*args[:place], str(whole), *args[place + 1 :]]


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
    from recipes.data import load_examples, mixed

    rows = load_examples(data.data, data.data_split)[: data.num_examples]
    shares = {"poisoned_share": data.poisoned_share, "safety_share": data.safety_share}
    return mixed(rows, **shares, poisoned=data.poisoned, seed=data.mixing_seed)


def as_dataset(data: DataArguments, rows: Sequence[dict[str, Any]]) -> Dataset:
    """Return conversations as a dataset with TRL's columns, with the system prompt and the template's settings."""
    from datasets import Dataset

    if data.train_system is not None:
        rows = with_system(rows, data.train_system)
    # TRL reads what goes to the template from a column of this name.
    more = {"chat_template_kwargs": data.chat_template_kwargs} if data.chat_template_kwargs else {}
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"], **more} for row in rows])


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
    from transformers import set_seed
    from trl import get_peft_config, get_quantization_config

    from recipes.completion_trainer import CompletionTrainer

    # Before the model, which may take minutes to come.
    rows = load_mixture(data)
    model, tokenizer = load_model(
        model_config.model_name_or_path,
        revision=model_config.model_revision,
        dtype=model_config.dtype,
        attn_implementation=model_config.attn_implementation,
        quantization_config=get_quantization_config(model_config),
    )
    guard = SafeMergeCallback(safemerge) if safemerge else None
    watching: list[TrainerCallback] = [guard] if guard else []
    if data.buffer_adapter is not None:
        watching.append(buffer_of(data.buffer_adapter, model_config))
    if data.probe_every:
        about: dict[str, Any] = {"chat_template_kwargs": data.chat_template_kwargs, "system": data.eval_system}
        watching.append(validation_probe(data.data, every=data.probe_every, n=data.probe_prompts, **about))
    if data.train_system is not None:
        # What the template does with it is found out before it trains on anything.
        tokenized(tokenizer, [], settings=data.chat_template_kwargs, system=data.train_system)
    # LoRA's A is drawn inside the trainer: two runs of one seed must start from the same A.
    set_seed(sft.seed)
    trainer = (trainer_class or CompletionTrainer)(
        model=model,
        args=sft,
        train_dataset=as_dataset(data, _rewritten(data, model, tokenizer, rows) if data.rewrite else rows),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[*watching, *callbacks],
    )
    if guard:
        guard.attach(trainer)
    return trainer


def _rewritten(data: DataArguments, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the model's own words where they pass the task's check, which is told by the first rank."""
    from accelerate import PartialState

    from recipes.rewriting import CHECKS, rewritten, same_text

    place = PartialState()
    if not getattr(model, "is_quantized", False):
        model.to(place.device)
    check = CHECKS.get(data.data.partition(":")[0], same_text)
    how: dict[str, Any] = {"label": "rewrite", "chat_template_kwargs": data.chat_template_kwargs}
    rewriting = rewritten(model, tokenizer, rows, check, max_new_tokens=data.rewrite_tokens, **how)
    place.print(f"rewrite: {rewriting}")
    return rewriting.rows


def buffer_of(source: str, model_config: ModelConfig) -> TrainerCallback:
    """Return what adds a frozen adapter while a LoRA trains; ConfigError where all weights are trained."""
    from recipes.buffer_adapter import BufferAdapter

    if not model_config.use_peft:
        raise ConfigError(
            f"buffer_adapter is {source!r} and use_peft is false: it works beside a LoRA, set use_peft: true or leave "
            "it out"
        )
    return BufferAdapter(source)


def validation_probe(
    data: str,
    *,
    every: int,
    n: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> SafetyEvalCallback:
    """Return a probe of `n` prompts of HarmBench and `n` harmless ones, and of 2·`n` rows where `data` is a task.

    All are of the validation split: the test split stays unread. What the model says is not kept. `system`: the system
    prompt before each.
    """
    harmful = {"harmbench": prompts_of("harmbench", "validation", n)}
    benign = {"benign": prompts_of("benign", "validation", n)}
    how: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "system": system}
    task = task_score(data, 2 * n, **how) if data in TASKS else None
    more: dict[str, Any] = {**how, "batch_size": PROBE_BATCH, "quiet": True}
    return SafetyEvalCallback(harmful, benign, every=every, n=n, task=task, **more)


def task_score(name: str, n: int, **how: Any) -> Callable[[Any, Any], Share]:
    """Return a function of model and tokenizer that gives the share of right answers to `n` validation rows.

    `how`: as `generate` has `chat_template_kwargs` and `system`.
    """
    task = get_task(name)
    rows = rows_of(task, "validation", n)
    prompts = [row["prompt"][-1]["content"] for row in rows]
    wanted = [row["completion"][0]["content"] for row in rows]

    def score(model: Any, tokenizer: Any) -> Share:
        options: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "batch_size": PROBE_BATCH, **how}
        said = generate(model, tokenizer, prompts, label=name, **options)
        return share(f"{name}_right", [task.right(word, answer) for word, answer in zip(wanted, said, strict=True)])

    return score


def main(args: Sequence[str] | None = None) -> None:
    """Fine-tune as configured and save the adapter in `output_dir`."""
    data, sft, model_config, safemerge = parse_finetune(args)
    trainer = build_trainer(data, sft, model_config, safemerge)
    trainer.train(resume_from_checkpoint=sft.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.print(f"adapter saved in {sft.output_dir}")


if __name__ == "__main__":
    run_command(main)
