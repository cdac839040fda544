"""A loss of our own in a training step: one more micro-batch before the step's first, whose gradient adds up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import nn

from ..errors import ConfigError
from ..live.faults import Fault, attempt
from ..live.gradients import TrainedParameters, pass_gradient
from ..live.micro_batch import MicroBatch, micro_batch, refusal
from ..live.ranks import many, mean_over_ranks
from ..live.stopwatch import Stopwatch
from ..record.entries import gradient_entry
from ..record.history import TermReading
from ..record.log import Log
from ..record.metrics import term_key
from .batchwise import BatchEngine
from .joining import Angles, TermGradient, join
from .passes import Pass, as_in_training, not_finite, pass_sum, scalar
from .protocol import (
    Apart,
    Batchwise,
    GradientTerm,
    Observant,
    PassSeries,
    Proximal,
    RunPoint,
    Tallied,
    Term,
    Unadded,
)
from .proximal import take_proximal_step


def way_for(terms: Sequence[Term], model: nn.Module, optimizer: Any = None, trainer: Any = None) -> MicroBatch | None:
    """Return how a training makes these terms' passes; None where there is no term. Collective under FSDP.

    `trainer`: where it was attached. ConfigError for the first term that cannot be in this training.
    """
    words = refusal(model, optimizer, trainer) if terms else None
    if words:
        raise ConfigError(f"correction {terms[0].name!r} adds a gradient, {words}; or leave it out")
    batch = micro_batch(model, optimizer, trainer) if terms else None
    for term in terms:
        _check_seen(term, batch)
    return batch


def order_line(terms: Sequence[Term]) -> str | None:
    """Return who sees whose gradient where one is kept apart and others are simply added; None where nobody does."""
    apart = [term.name for term in terms if isinstance(term, Apart) and term.weight]
    added = [term.name for term in terms if not isinstance(term, Apart) and term.weight]
    if not apart or not added:
        return None
    return f"{', '.join(apart)} takes the gradient of {', '.join(added)} for a part of the task's: it joins last"


def _check_seen(term: Term, batch: MicroBatch | None) -> None:
    """Raise ConfigError for a term whose gradient must be seen by itself where it is not."""
    if batch is None or not isinstance(term, Apart | PassSeries):
        return
    series = isinstance(term, PassSeries)
    who = f"correction {term.name!r} " + (
        "makes its gradient of several passes" if series else "keeps its gradient apart from the task's"
    )
    if batch.trained is None:
        raise ConfigError(
            f"{who}, and DeepSpeed shows {'none of them' if series else 'neither'}: train in one process, with DDP or "
            "with FSDP, or leave it out"
        )
    if batch.scaler is not None:
        raise ConfigError(f"{who}, where fp16's scaler does not see it overflow: train in bf16, or leave it out")


def add_gradient(term: Term, at: RunPoint, batch: MicroBatch) -> Pass:
    """Add a term's weighted gradient to the step's, unless anything in it is not finite on any rank. Collective.

    Random states, the modules' modes and the parameters are given back. What goes wrong on a rank is in what is
    returned, and leaves no gradient there; but where passes are collective it is raised. Of a loss one number is
    exchanged: the one wait for the device.
    """
    with as_in_training(batch.model, at.optimizer):
        if isinstance(term, PassSeries):
            return pass_sum(term, at, batch)
        return _loss_gradient(cast(GradientTerm, term), at, batch)


def _loss_gradient(term: GradientTerm, at: RunPoint, batch: MicroBatch) -> Pass:
    """Add the gradient of weight · loss."""
    loss = _survived(term, batch, lambda: scalar(term, term.loss(at, batch.model)))
    fault = loss if isinstance(loss, Fault) else None
    mean = mean_over_ranks(math.nan if fault else loss, batch.device)
    if fault or not math.isfinite(mean):
        return Pass(math.nan, fault or Fault(term.name, not_finite("loss", float(loss.detach()))))
    done = _survived(term, batch, lambda: batch.backward(term.weight * loss))
    return Pass(mean, done if isinstance(done, Fault) else None)


def _survived(term: Term, batch: MicroBatch, action: Callable[[], Any]) -> Any:
    """What `action` gives, or the fault, after which every gradient is as it was; it is raised in collective passes."""
    if batch.trained is None or batch.collective:
        return action()
    before = [None if g is None else g.clone() for g in batch.trained.gradients()]
    done = attempt(term.name, action)
    if isinstance(done, Fault):
        batch.trained.restore(before)
    return done


@dataclass
class Tally:
    """What a term came to since it was last told; of its seconds, which `watch` has, `reported` were told before."""

    watch: Stopwatch
    total: float = 0.0
    steps: int = 0
    reported: float = 0.0

    def reading(self, weight: float, known: Mapping[str, float], figures: Mapping[str, float]) -> TermReading:
        """Return it in numbers, with the norm and cosine where they are known, and begin anew."""
        seconds = self.watch.seconds
        reading = TermReading(
            weight, self.total / self.steps, self.steps, seconds - self.reported, **known, figures=figures
        )
        self.total, self.steps, self.reported = 0.0, 0, seconds
        return reading


@dataclass
class GradientEngine:
    """Adds the terms that are due to each step's gradient, and tells of them; it knows no term by name.

    `batch`: how the training takes one more micro-batch; None where there is no term. `others` correct what the step's
    own batches give.
    """

    terms: Sequence[Term]
    batch: MicroBatch | None
    log: Log
    others: Sequence[Batchwise] = ()
    tallies: dict[str, Tally] = field(default_factory=dict)
    gradients: list[TermGradient] = field(default_factory=list)
    measured: bool = False
    angles: Angles | None = None

    def __post_init__(self) -> None:
        self.batchwise = BatchEngine(self.others, self.log)

    @property
    def idle(self) -> bool:
        """Whether no step's gradient is any of its business."""
        return not self.terms and not self.others

    @property
    def untold(self) -> bool:
        """Whether there is anything to report."""
        return self.batchwise.untold or any(tally.steps for tally in self.tallies.values())

    def before_step(self, at: RunPoint, *, measured: bool = False) -> None:
        """Add what is due in the step that comes after `at`. Every rank calls it alike; weight 0 is absence.

        `measured`: whether norms and angles of this step's gradients are asked for. Terms that keep theirs apart come
        first, while there is no other.
        """
        self.gradients, self.angles, self.measured = [], None, measured
        step = at.step + 1
        due = [t for t in self.terms if t.weight and t.schedule.due(step, at.max_steps, last=step >= at.max_steps)]
        for term in sorted(due, key=lambda term: not isinstance(term, Apart)):
            self._add(term, at)
        self.batchwise.enter(at)

    def _add(self, term: Term, at: RunPoint) -> None:
        batch, step = cast(MicroBatch, self.batch), at.step + 1
        tally = self.tallies.setdefault(term.name, Tally(Stopwatch(batch.device)))
        apart = isinstance(term, Apart)
        trained = batch.trained if apart or self.measured else None
        with tally.watch.lap(), pass_gradient(trained, apart=apart) as gradient:
            done = add_gradient(term, at, batch)
        if done.fault:
            words = f"{term.name} failed at step {step}, which goes without its gradient: {done.fault.error}"
            self.log.fault(step, done.fault, words, alert="a gradient term failed")
        if math.isfinite(done.loss):
            tally.total, tally.steps = tally.total + done.loss, tally.steps + 1
            self.log.progress.record_correction(term.name)
            if trained:
                vector = batch.unscaled(trained.mean(gradient.vector))
                self.gradients.append(TermGradient(term, vector, gradient.tensors, apart))
            if isinstance(term, Observant):
                self._ask(term, step, "take note of its loss", partial(term.observe, step, done.loss), alike=True)

    def after_update(self, at: RunPoint) -> None:
        """Let the step that was just made end where the terms draw it, for those that do. Collective."""
        for term in self.terms:
            if isinstance(term, Proximal):
                take_proximal_step(term, at, self.log)

    def before_update(self, step: int) -> None:
        """Let what was kept apart join the step's gradient, which is whole, averaged and clipped now."""
        self.batchwise.leave(step)
        if not self.gradients:
            return
        trained = cast(TrainedParameters, cast(MicroBatch, self.batch).trained)
        if self.measured:
            self.angles = Angles.of(trained, self.gradients)
        for gradient in self.gradients:
            if gradient.apart:
                self._ask(gradient.term, step, "join its gradient", partial(join, trained, gradient), alike=True)
        self.gradients = []

    def _ask(self, term: Term, step: int, what: str, action: Callable[[], Any], *, alike: bool = False) -> Any | None:
        """What the term answers; None where it fails, which is told. `alike`: and all ranks must come to the same.

        One of many ranks that went on without an answer would part from the others, so it is raised there.
        """
        if alike and many():
            return action()
        answer = attempt(term.name, action)
        if isinstance(answer, Fault):
            words = f"{term.name} could not {what} at step {step}, training goes on: {answer.error}"
            self.log.fault(step, answer, words, kind=f"{term.name} {what}", alert="a gradient term failed")
            return None
        return answer

    def report(self, step: int, norm: float | None = None) -> dict[str, float]:
        """Note what each term came to since it was last told, and return it by its keys for trackers.

        `norm`: that of the step's whole gradient before it was clipped; None where it was not clipped.
        """
        angles = self.angles.readings(norm) if self.angles else {}
        self.angles = None
        numbers = self.batchwise.report(step)
        for term in self.terms:
            tally = self.tallies.get(term.name)
            if tally is not None and tally.steps:
                figures = self._ask(term, step, "tell its figures", term.figures) if isinstance(term, Tallied) else {}
                weight = 0.0 if isinstance(term, Unadded) and not term.adds else term.weight
                reading = tally.reading(weight, angles.get(term.name, {}), figures or {})
                self.log.note(gradient_entry(step, term.name, reading))
                numbers |= {term_key(term.name, figure): value for figure, value in reading.numbers().items()}
        return numbers
