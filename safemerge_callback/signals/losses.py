"""The loss of a live model on batches, which changes nothing about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..errors import ConfigError
from .model_state import preserve_state

# Batches of an evaluation set that a loss is taken on.
EVAL_BATCHES = 50


def mean_loss(model: Any, batches: Iterable[Any], limit: int = EVAL_BATCHES) -> float:
    """Return the mean loss of `model` on the first `limit` batches, in evaluation mode: a forward pass for each.

    Every rank must call it. Raises whatever a model raises that gives no loss of its own for such batches.
    """
    import torch

    losses = []
    for batch in islice(batches, limit):
        # Each by itself: what a loader draws from the random state is its caller's doing.
        with preserve_state(model):
            losses.append(model(**batch).loss.detach().float())
    return float(torch.stack(losses).mean())


@dataclass
class EvalLoss:
    """The mean loss on the first 50 evaluation batches, read once and kept: a forward pass for each, as `mean_loss`."""

    source: Iterable[Any] | Callable[[], Iterable[Any]]
    batches: list[Any] = field(default_factory=list)

    def load(self) -> None:
        """Read the batches; ConfigError where there are none."""
        if self.batches:
            return
        try:
            loader: Any = self.source() if callable(self.source) else self.source
            self.batches = list(islice(loader, EVAL_BATCHES))
        except Exception as error:
            raise ConfigError(f"eval_batches cannot be read ({type(error).__name__}: {error})") from error
        if not self.batches:
            raise ConfigError("eval_batches holds no batch: give the trainer's evaluation batches")
        # A loader that was not read to its end would stay accelerate's active one, in place of the training's.
        if hasattr(loader, "gradient_state"):
            loader.end()

    def __call__(self, model: Any) -> float:
        """Return the loss of the live model; raises what the model raises, or KeyError-like where it gives no loss."""
        from accelerate.utils import send_to_device

        return mean_loss(model, (send_to_device(batch, model.device) for batch in self.batches))
