"""A frozen adapter that is at work beside the live one while a model trains, and nowhere else (Buffer and Reinforce).

It is added by hooks on the modules that the live adapter has, while they are in training mode: it is no part of the
model, so that nothing saves, measures, merges or resumes it, and what evaluates the model in between sees what will be
left of it.
Source: Buffer and Reinforce, arXiv:2605.24550. Differs: the release merges it into the base weights, in bf16, and puts
the trained adapter on clean ones in fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from safemerge_callback.adapters import Adapter, LoraFactors, load_adapter
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.modules import lora_layers

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


# What takes away the one that is at work in a model, also where an error ended that training.
_AT_WORK: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()


class BufferAdapter(TrainerCallback):
    """Adds an adapter of a folder or of the Hub while a trainer trains; AdapterError where there is none."""

    def __init__(self, source: str) -> None:
        self.adapter = load_adapter(source)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_more: Any
    ) -> None:
        """Add it, before any pass; ConfigError where it does not fit the live adapter."""
        _take_away(model)
        _AT_WORK[model] = add_in_training(model, self.adapter)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_more: Any
    ) -> None:
        """Take it away again."""
        _take_away(model)


def _take_away(model: nn.Module) -> None:
    remove = _AT_WORK.pop(model, None)
    if remove is not None:
        remove()


def add_in_training(model: nn.Module, adapter: Adapter) -> Callable[[], None]:
    """Add an adapter's outputs to those of the live one's modules, in training mode only; return what ends that.

    With the live adapter switched off (`disable_adapter`) it is off, too. Neither parameters nor buffers are added to
    the model. ConfigError for a module that the live adapter has not, of another shape, or that is no linear map.
    """
    layers = lora_layers(model)[1]
    for name, factors in adapter.factors.items():
        _check(name, factors, layers.get(name), str(adapter.source))
    handles = [
        layers[name].register_forward_hook(partial(_add, FrozenFactors(factors)))
        for name, factors in adapter.factors.items()
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _check(name: str, factors: LoraFactors, layer: Any, source: str) -> None:
    if layer is None:
        raise ConfigError(
            f"buffer_adapter {source!r} adapts module {name!r}, which the adapter that is trained has not: train the "
            "same lora_target_modules"
        )
    shape = layer.out_features, layer.in_features
    if factors.shape != shape or len(getattr(layer, "lora_embedding_A", ())):
        raise ConfigError(
            f"buffer_adapter {source!r} has {factors.shape} (outputs, inputs) in module {name!r}, which is "
            f"{type(layer.get_base_layer()).__name__} of {shape}: give an adapter of linear modules that was trained "
            "on this model"
        )


class FrozenFactors:
    """A module's factors, copied once to wherever they are needed."""

    def __init__(self, factors: LoraFactors) -> None:
        self.factors = factors
        self.copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def outputs(self, x: Tensor) -> Tensor:
        """Return s·B·A·x of inputs (..., d_in), (..., d_out), with gradients for x alone."""
        place = x.device, x.dtype
        if place not in self.copies:
            A, B = self.factors.A.detach().to(*place), self.factors.B.detach().to(*place)
            self.copies[place] = A, B * self.factors.scaling
        A, B = self.copies[place]
        return nn.functional.linear(nn.functional.linear(x, A), B)


def _add(frozen: FrozenFactors, layer: Any, args: tuple[Any, ...], outputs: Tensor) -> Tensor | None:
    if not layer.training or layer.disable_adapters:
        return None
    return outputs + frozen.outputs(args[0]).to(outputs.dtype)
