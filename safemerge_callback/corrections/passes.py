"""The passes that a gradient term makes, each on this rank's rows, and their sum where a term makes several.

Apart from the engine, which knows when terms are due and what is told of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..live.faults import Fault, attempt
from ..live.gradients import Gradients, TrainedParameters
from ..live.micro_batch import MicroBatch
from ..live.ranks import mean_over_ranks
from ..signals.model_state import preserve_random_states
from .protocol import PassSeries, RunPoint, Term, TermPass


class Pass(NamedTuple):
    """What a term's passes came to: the mean loss over the ranks, NaN where it was dropped, and this rank's fault."""

    loss: float
    fault: Fault | None = None


@contextmanager
def as_in_training(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Gradients and training mode within; then the random states and every module's own mode as they were."""
    idle = [module for module in model.modules() if not module.training]
    with preserve_random_states(model), torch.enable_grad():
        model.train()
        # An optimizer that is free of a schedule holds other weights for evaluation than it trains.
        if callable(to_train := getattr(optimizer, "train", None)):
            to_train()
        try:
            yield
        finally:
            for module in idle:
                module.training = False


def scalar(term: Term, loss: Tensor) -> Tensor:
    """Return a loss; ValueError for one that is no scalar."""
    if loss.ndim:
        raise ValueError(f"the loss of {term.name!r} has the shape {tuple(loss.shape)}: a scalar was expected")
    return loss


def not_finite(what: str, value: float) -> str:
    """Return in words that a number of this rank's, or of another's, is not finite."""
    return f"its {what} is not finite on another process" if math.isfinite(value) else f"its {what} is {value}"


def pass_sum(term: PassSeries, at: RunPoint, batch: MicroBatch) -> Pass:
    """Add weight · Σ of the passes' weighted gradients to the step's, or nothing of it. Collective.

    The loss is that of the first pass. Ranks exchange after each pass its loss and gradient, and a number at the end.
    """
    trained = cast(TrainedParameters, batch.trained)
    before = trained.gradients()
    total = _Sum(term, batch, trained)
    try:
        fault = total.over(term.passes(at, batch.model, trained))
    finally:
        trained.restore(before)
    if fault is not None or total.vector is None:
        return Pass(math.nan, fault)
    trained.add(term.weight * total.vector, total.tensors)
    return Pass(total.loss)


@dataclass
class _Sum:
    """The sum of a series as it grows; the gradients of the parameters are its own meanwhile."""

    term: PassSeries
    batch: MicroBatch
    trained: TrainedParameters
    vector: Tensor | None = None
    tensors: Gradients = field(default_factory=list)
    loss: float = math.nan

    def over(self, passes: Generator[TermPass, Tensor, None]) -> Fault | None:
        """Make the passes, each a step of all ranks; return what went wrong, the same on all in that it did."""
        gradient: Tensor | Fault | None = None
        while not isinstance(gradient, Fault):
            following = self._survived(partial(_following, passes, gradient))
            if following is None:
                # Another rank may have failed where this one came to the end.
                late = mean_over_ranks(0.0, self.batch.device)
                return None if math.isfinite(late) else Fault(self.term.name, "it failed on another process")
            gradient = self._gradient(following)
        passes.close()
        return gradient

    def _gradient(self, one: TermPass | Fault) -> Tensor | Fault:
        """The gradient of a pass, added up; or why there is none. The parameters are displaced for no longer."""
        name, device = self.term.name, self.batch.device
        with ExitStack() as stack:
            loss: Any = one if isinstance(one, Fault) else self._survived(lambda: self._loss(one, stack))
            fault = loss if isinstance(loss, Fault) else None
            mean = mean_over_ranks(math.nan if fault else loss, device)
            if fault or not math.isfinite(mean):
                return fault or Fault(name, not_finite("loss", float(loss.detach())))
            done = self._survived(lambda: self.batch.backward(loss))
            mine = self.trained.vector(self.trained.gradients())
        vector = self.trained.mean(mine * math.nan if isinstance(done, Fault) else mine)
        size = float(self.trained.norm(vector))
        if not math.isfinite(size):
            return done if isinstance(done, Fault) else Fault(name, f"the norm of its gradient is {size}")
        self._add(cast(TermPass, one).weight, vector, mean)
        return vector

    def _loss(self, one: TermPass, stack: ExitStack) -> Tensor:
        """A pass forward, where it is to be made; every one draws the same random numbers, backward, too."""
        self.trained.restore([None] * len(self.trained.parameters))
        stack.enter_context(preserve_random_states(self.batch.model))
        if one.displacement is not None:
            stack.enter_context(self.trained.displaced(one.displacement))
        return scalar(self.term, one.loss(self.batch.model))

    def _add(self, weight: float, vector: Tensor, loss: float) -> None:
        if self.vector is None:
            self.vector, self.tensors, self.loss = weight * vector, self.trained.gradients(), loss
            return
        self.vector += weight * vector
        pairs = zip(self.tensors, self.trained.gradients(), strict=True)
        self.tensors = [other if first is None else first for first, other in pairs]

    def _survived(self, action: Callable[[], Any]) -> Any:
        """What `action` gives, or the fault; it is raised in collective passes."""
        return action() if self.batch.collective else attempt(self.term.name, action)


def _following(passes: Generator[TermPass, Tensor, None], gradient: Tensor | None) -> TermPass | None:
    """The next pass, of what the last one gave; None at the end."""
    try:
        return next(passes) if gradient is None else passes.send(gradient)
    except StopIteration:
        return None
