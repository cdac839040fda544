"""A frozen adapter that is at work beside the live one while a model trains, and nowhere else (Buffer and Reinforce).

It is added by hooks on the modules that the live adapter has, while they are in training mode: it is no part of the
model, so that nothing saves, measures, merges or resumes it, and what evaluates the model in between sees what will be
left of it.
Source: Buffer and Reinforce, arXiv:2605.24550. Differs: the release merges it into the base weights, in bf16, and puts
the trained adapter on clean ones in fp16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from safemerge_callback.adapters import Adapter, LoraFactors, load_adapter
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.batch_hooks import batch_hooks, begin_run
from safemerge_callback.live.modules import lora_layers

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class BufferAdapter(TrainerCallback):
    """Adds an adapter of a folder or of the Hub while a trainer trains; AdapterError where there is none."""

    def __init__(self, source: str) -> None:
        self.adapter = load_adapter(source)
        self.at_work = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_more: Any
    ) -> None:
        """Add it, before any pass; ConfigError where it does not fit the live adapter."""
        begin_run(model, state, Trainer.train)
        self.at_work.enter_context(added_in_training(model, self.adapter))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_more: Any
    ) -> None:
        """Take it away again."""
        self.at_work.close()


@contextmanager
def added_in_training(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Within, an adapter's outputs are added to those of the live one's modules, in training mode only.

    With the live adapter switched off (`disable_adapter`) it is off, too. Neither parameters nor buffers are added to
    the model. ConfigError for a module that the live adapter has not, of another shape, or that is no linear map.
    """
    layers = lora_layers(model)[1]
    for name, factors in adapter.factors.items():
        _check(name, factors, layers.get(name), str(adapter.source))
    with batch_hooks(model, "buffer_adapter", whole=False) as hooks:
        for name, factors in adapter.factors.items():
            hooks.after(layers[name], partial(_add, FrozenFactors(factors)))
        yield


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
