"""A loss of our own in a training step: one more micro-batch before the step's first, whose gradient adds up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..live.engine import ENGINES
from ..live.faults import Fault, attempt
from ..ops import wide_dtype
from ..record.entries import gradient_entry
from ..record.log import Log
from ..signals.model_state import preserve_random_states
from .protocol import GradientTerm, RunPoint

# Where gradients are whole on every rank and are averaged at the last micro-batch: a backward before it adds to them.
SERVED = ENGINES[:2]


def check_gradient_engine(name: str, engine: str) -> None:
    """Raise ConfigError for an engine in which one more micro-batch is not proven to be exact."""
    if engine not in SERVED:
        raise ConfigError(
            f"correction {name!r} adds a gradient, which is not done under {engine} yet: train in one process or with "
            "DDP, or leave it out"
        )


def add_gradient(term: GradientTerm, at: RunPoint, model: nn.Module, scaler: Any = None) -> Tensor:
    """Add the gradient of weight · loss to what the parameters have; return the loss, detached, in `wide_dtype`.

    `scaler`: torch's GradScaler where the training has one. The random states and the modules' modes are given back;
    after an error the gradients are, too. Raises what the term raises, and ValueError for a loss that is no scalar.
    """
    with _gradients_kept(model), preserve_random_states(model), _training(model), torch.enable_grad():
        loss = term.loss(at, model)
        if loss.ndim:
            raise ValueError(f"the loss of {term.name!r} has the shape {tuple(loss.shape)}: a scalar was expected")
        weighted = term.weight * loss
        (weighted if scaler is None else scaler.scale(weighted)).backward()
    return loss.detach().to(wide_dtype(loss.device))


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Give every gradient back as it was where something is raised within."""
    before = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters() if p.requires_grad]
    try:
        yield
    except BaseException:
        for parameter, gradient in before:
            parameter.grad = gradient
        raise


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode within, and every module's own mode after it."""
    idle = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in idle:
            module.training = False


@dataclass
class TermLosses:
    """The losses of a term since they were last told, on the device, and over how many steps."""

    total: Tensor | float = 0.0
    steps: int = 0


@dataclass
class GradientEngine:
    """Adds the terms that are due to each step's gradient, and tells of their losses; it knows no term by name."""

    terms: Sequence[GradientTerm]
    log: Log
    losses: dict[str, TermLosses] = field(default_factory=dict)

    def before_step(self, at: RunPoint, model: nn.Module) -> None:
        """Add what is due in the step that comes after `at`. Every rank calls it alike; weight 0 is absence."""
        for term in self.terms:
            step = at.step + 1
            if term.weight and term.schedule.due(step, at.max_steps, last=step >= at.max_steps):
                self._add(term, at, model)

    def _add(self, term: GradientTerm, at: RunPoint, model: nn.Module) -> None:
        scaler = getattr(at.optimizer, "scaler", None)
        loss = attempt(term.name, lambda: add_gradient(term, at, model, scaler))
        if isinstance(loss, Fault):
            words = f"{term.name} failed at step {at.step + 1}, which goes without its gradient: {loss.error}"
            self.log.fault(at.step + 1, loss, words, alert="a gradient term failed")
            return
        losses = self.losses.setdefault(term.name, TermLosses())
        losses.total, losses.steps = losses.total + loss, losses.steps + 1

    def report(self, step: int) -> dict[str, float]:
        """Note each term's mean loss since it was last told, and return it by its key for trackers. Waits for it."""
        means = {name: (float(losses.total) / losses.steps, losses.steps) for name, losses in self.losses.items()}
        self.losses.clear()
        weights = {term.name: term.weight for term in self.terms}
        for name, (mean, steps) in means.items():
            self.log.note(gradient_entry(step, name, weights[name], mean, steps))
        return {f"safemerge/corrections/{name}/loss": mean for name, (mean, _) in means.items() if math.isfinite(mean)}
