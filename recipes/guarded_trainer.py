"""A trainer of TRL's with model, LoRA and callbacks, as a recipe's settings say: what SFT, DPO and GRPO share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recipes.data.splits import prompts_of, rows_of
from recipes.data.system import with_system
from recipes.data.tasks import TASKS, get_task
from recipes.models import load_model
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import Share, share
from safemerge_callback.signals import generate
from safemerge_callback.signals.responses import tokenized
from safemerge_callback.training import SafeMergeCallback, SafeMergeConfig, SafetyEvalCallback

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import ModelConfig

    from recipes.arguments import ExampleArguments

PROBE_BATCH = 32


def guarded_trainer(
    kind: Callable[..., Any],
    examples: Callable[[Any, Any], Dataset],
    data: ExampleArguments,
    args: Any,
    model_config: ModelConfig,
    safemerge: SafeMergeConfig | None = None,
    *,
    template: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """Return a trainer of a `kind`, ready to train: model, tokenizer, data, LoRA, and the callback if configured.

    `examples`: the training set, of the model and its tokenizer; `args`: the kind's own settings; `template`: what the
    chat template is given.
    """
    from transformers import set_seed
    from trl import get_peft_config, get_quantization_config

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
        about: dict[str, Any] = {"chat_template_kwargs": template, "system": data.eval_system}
        watching.append(validation_probe(data.data, every=data.probe_every, n=data.probe_prompts, **about))
    if data.train_system is not None:
        # What the template does with it is found out before it trains on anything.
        tokenized(tokenizer, [], settings=template, system=data.train_system)
    # LoRA's A is drawn inside the trainer: two runs of one seed must start from the same A.
    set_seed(args.seed)
    trainer = kind(
        model=model,
        args=args,
        train_dataset=examples(model, tokenizer),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[*watching, *callbacks],
    )
    if guard:
        guard.attach(trainer)
    return trainer


def dataset_of(
    data: ExampleArguments,
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    template: Mapping[str, Any] | None = None,
) -> Dataset:
    """Return conversational rows as a dataset of these columns, with the system prompt and the template's settings."""
    from datasets import Dataset

    if data.train_system is not None:
        rows = with_system(rows, data.train_system)
    # TRL reads what goes to the template from a column of this name.
    more = {"chat_template_kwargs": template} if template else {}
    return Dataset.from_list([{**{name: row[name] for name in columns}, **more} for row in rows])


def train(trainer: Any) -> None:
    """Train, from a checkpoint where the settings name one, and save the adapter in `output_dir`."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.print(f"adapter saved in {trainer.args.output_dir}")


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
