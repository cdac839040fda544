"""One more micro-batch in a training step: how each engine takes a loss of ours, and which cannot.

A step's first batch has not come yet, so gradients are zero and clipping is still to come. To every engine this is the
case that it is built for, a micro-batch before the last: it adds to the step's gradient, and nobody is overridden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .engine import engine_of
from .gradients import TrainedParameters


@dataclass(frozen=True)
class MicroBatch:
    """How a loss goes through what runs the training.

    `model` is what a loss calls: the model, or the engine around it. `backward(loss)` adds the loss's gradient to the
    step's; the mean over the ranks counts. `collective`: every rank must run a pass when the others do, so an error in
    one cannot be survived by a rank alone. `trained`: whose gradients can be read afterwards, None where the engine
    keeps them to itself. `scaler`: torch's GradScaler, where there is one.
    """

    model: nn.Module
    backward: Callable[[Tensor], None]
    collective: bool = False
    trained: TrainedParameters | None = None
    scaler: Any = None

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.model.parameters()).device

    def unscaled(self, vector: Tensor) -> Tensor:
        """Return a gradient without the factor of the scaler."""
        return vector if self.scaler is None else vector / self.scaler.scale(vector.new_ones(()))


def micro_batch(model: nn.Module, optimizer: Any = None, trainer: Any = None) -> MicroBatch:
    """Return how a training takes one more micro-batch, once its engine has taken the model. Collective under FSDP.

    `model` and `optimizer` are what the trainer gives its callbacks; `trainer` is needed where `refusal` asks for it.
    In one process and under DDP it is the model itself that is called: DDP's hooks heed no pass but their own, and
    average what is there after the step's last batch. FSDP averages each pass at once.
    """
    engine = engine_of(model, optimizer)
    if engine == "DeepSpeed":
        return MicroBatch(trainer.model_wrapped, partial(_before_the_last, trainer.accelerator), collective=True)
    scaler = getattr(optimizer, "scaler", None)
    trained = TrainedParameters.of(model)
    return MicroBatch(model, partial(_backward, scaler), engine == "FSDP", trained, scaler)


def _backward(scaler: Any, loss: Tensor) -> None:
    (loss if scaler is None else scaler.scale(loss)).backward()


def _before_the_last(accelerator: Any, loss: Tensor) -> None:
    """Let DeepSpeed take it for a micro-batch before the step's last: else it makes the optimizer's step at once."""
    state = accelerator.gradient_state
    last = state.sync_gradients
    # The trainer has set it for its own next batch already, and does not again.
    state._set_sync_gradients(False)
    try:
        accelerator.backward(loss, scale_wrt_gas=False)
    finally:
        state._set_sync_gradients(last)


# What splits a row over processes, so that no rank has a loss of its own, or a layer, so that none has a gradient.
_SPLITS = {"cp_size": "context", "sp_size": "sequence", "tp_size": "tensor"}

# Optimizers of transformers that step in hooks of the backward pass, as each gradient comes.
_INSIDE = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo")


def refusal(model: nn.Module, optimizer: Any = None, trainer: Any = None) -> str | None:
    """Return why this training cannot take one more micro-batch, and what to do, in words after a name; or None."""
    state = _accelerate_state()
    if state.get("distributed_type") == "MEGATRON_LM":
        return "which Megatron-LM, whose passes are its own, does not take: train with DDP, FSDP or DeepSpeed"
    if (inside := _steps_inside(optimizer)) is not None:
        return f"and optimizer {inside} makes its step inside every backward pass: take another"
    deepspeed = engine_of(model, optimizer) == "DeepSpeed"
    wrapped = trainer.model_wrapped if deepspeed and trainer is not None else None
    if words := _split(model, state.get("parallelism_config"), wrapped):
        return (
            f"and {words} splits rows or layers over processes, so that no process has a loss of its own: train "
            "without it"
        )
    if not deepspeed:
        return None
    if trainer is None:
        return (
            "which DeepSpeed takes only through its engine: keep the callback in a variable, say guard, and add the "
            "line guard.attach(trainer) before trainer.train()"
        )
    if not _said_by(wrapped, "managed_gradient_accumulation", True):
        return (
            "and DeepSpeed's managed_gradient_accumulation is false, so that it takes no batch for one before the "
            "last: take that out of the DeepSpeed settings"
        )
    return None


def _accelerate_state() -> dict[str, Any]:
    """What accelerate knows of this process; nothing where no trainer has asked it."""
    from accelerate.state import AcceleratorState

    return AcceleratorState._shared_state


def _steps_inside(optimizer: Any) -> str | None:
    """The name of an optimizer that does not wait for the step's last batch."""
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__
    return name if name in _INSIDE else None


def _split(model: nn.Module, config: Any, deepspeed: Any) -> str:
    """By what rows or layers are split over processes, in words; empty where they are not."""
    sizes = {words: getattr(config, name, None) or 1 for name, words in _SPLITS.items()}
    loaded = getattr(model, "_tp_size", None) or 1
    sizes["tensor"] = max(sizes["tensor"], loaded, _said_by(deepspeed, "autotp_size", 1))
    return next((f"{words} parallelism" for words, size in sizes.items() if size > 1), "")


def _said_by(deepspeed: Any, question: str, otherwise: Any) -> Any:
    """What DeepSpeed's engine answers; what holds otherwise where there is none, or none that knows the question."""
    answer = getattr(deepspeed, question, None)
    return otherwise if answer is None else answer()
