"""The reference: the aligned model is the same model with its adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..live.forward import first_pass
from ..live.modules import base_moved, trained_base
from .model_state import preserve_state


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within, a PEFT model answers without its adapters; afterwards what was trainable is, and nothing else.

    ConfigError where there is no adapter to put off, where one is merged into the base weights, where it has taken a
    part of these, and where some of these are trained: the reference would move with them, and be another at each
    resume.
    """
    peft_model: Any = next((module for module in model.modules() if hasattr(module, "disable_adapter")), None)
    if peft_model is None:
        raise ConfigError(
            "the model has no adapter that could be put off, and without it there is no reference: train a LoRA "
            "(peft_config, or get_peft_model before the Trainer)"
        )
    merged = next((name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)), None)
    if merged is not None:
        raise ConfigError(
            f"an adapter is merged into the base weight of {merged!r}, so the base is not the aligned model any more: "
            "unmerge it (model.unmerge_adapter()), or save the merged model and add a new adapter to it"
        )
    if base_moved(model):
        raise ConfigError(
            "the adapter began as a part of the base weight (PiSSA, OLoRA), so the model without it is not the aligned "
            "one: train a LoRA with init_lora_weights=True"
        )
    if trained := trained_base(peft_model):
        more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        raise ConfigError(
            f"{trained[0]!r}{more} are trained and belong to the base model, so with its adapter off the model is the "
            "aligned one only until the first step: train with bias='none' and the base frozen "
            "(requires_grad_(False)); a module that must be trained goes into modules_to_save, which keeps the original"
        )
    with preserve_state(model):
        first_pass(model)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with peft_model.disable_adapter():
            yield
    finally:
        # PEFT makes all of the active adapters trainable when it puts them on again, also what the user had frozen.
        for parameter, was in trainable:
            if parameter.requires_grad != was:
                parameter.requires_grad = was
