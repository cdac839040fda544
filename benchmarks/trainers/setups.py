"""What every cell's trainer is made of: the settings of a short run on the CPU, and a LoRA."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from .cell import Make, Setup
from .world import Base

TARGETS = ["q_proj", "v_proj"]


def settings(output: str, **changed: Any) -> dict[str, Any]:
    """Arguments of any trainer's config: three steps of two rows, nothing saved or reported."""
    return {
        "output_dir": output,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        **changed,
    }


def lora(**changed: Any) -> LoraConfig:
    """A LoRA of rank 4 and scaling 2 on two modules a layer."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changed})


def adapted(model: nn.Module, **changed: Any) -> nn.Module:
    """The model with such a LoRA."""
    return get_peft_model(model, lora(**changed))


def trl(
    trainer: str,
    config: str,
    data: Any,
    *,
    home: str = "trl",
    kind: str | None = None,
    loading: dict[str, Any] | None = None,
    peft: dict[str, Any] | None = None,
    config_home: str | None = None,
    give: str = "peft_config",
    arguments_of: Any = None,
    **options: Any,
) -> Make:
    """A TRL trainer by name, with its config's options and what else its constructor is given.

    `kind` and `loading` say how the base is loaded; `give` is what the trainer gets: a model and "peft_config", a
    "PeftModel", or the checkpoint's "path" and a peft_config; `arguments_of(base)` makes more of the
    constructor's arguments.
    """

    def make(base: Base, output: str, callbacks: list[TrainerCallback]) -> Setup:
        import importlib

        module = importlib.import_module(home)
        args = getattr(importlib.import_module(config_home or home), config)(**settings(output, **options))

        def fresh() -> nn.Module:
            return base.model(kind, **(loading or {}))

        adapter = lora(**(peft or {}))
        model = base.aligned if give == "path" else fresh()
        built = getattr(module, trainer)(
            model=get_peft_model(model, adapter) if give == "PeftModel" else model,
            args=args,
            train_dataset=data(),
            processing_class=base.tokenizer,
            callbacks=callbacks,
            **({} if give == "PeftModel" else {"peft_config": adapter}),
            **(arguments_of(base) if arguments_of else {}),
        )
        return Setup(built, fresh)

    return make


def plain(
    data: Any,
    *,
    kind: str | None = None,
    trainer: str = "Trainer",
    config: str = "TrainingArguments",
    loading: dict[str, Any] | None = None,
    change: Any = None,
    options: dict[str, Any] | None = None,
    **peft: Any,
) -> Make:
    """A trainer of transformers on a PeftModel; `change(model)` may do more to it and return another."""

    def make(base: Base, output: str, callbacks: list[TrainerCallback]) -> Setup:
        import transformers

        def fresh() -> nn.Module:
            return base.model(kind, **(loading or {}))

        model: Any = adapted(fresh(), **peft)
        model = change(model) if change else model
        args = getattr(transformers, config)(**settings(output, **(options or {})))
        built = getattr(transformers, trainer)(model=model, args=args, train_dataset=data(), callbacks=callbacks)
        return Setup(built, fresh)

    return make
