"""Corrections of what a step's own batches teach: put on before the first of them, off before the optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from ..live.faults import Fault
from ..record.entries import gradient_entry
from ..record.history import TermReading
from ..record.log import Log
from ..record.metrics import term_key
from .protocol import Batchwise, GradientTerm, PassSeries, RunPoint, Tallied


@dataclass
class BatchEngine:
    """Has the corrections that are due at work while the trainer's own batches pass, and tells of them.

    One that is a gradient term, too, is told of there.
    """

    corrections: Sequence[Batchwise]
    log: Log
    steps: dict[str, int] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    within: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.terms = {one.name for one in self.corrections if isinstance(one, GradientTerm | PassSeries)}

    @property
    def untold(self) -> bool:
        """Whether there is anything to report."""
        return any(self.steps.values())

    def enter(self, at: RunPoint) -> None:
        """Put on what is due in the step that comes after `at`, whose passes of gradient terms are over."""
        self.within.close()
        for one in self.corrections:
            step = at.step + 1
            if one.schedule.due(step, at.max_steps, last=step >= at.max_steps):
                self.faults[one.name] = self.within.enter_context(one.batches(at))

    def leave(self, step: int) -> None:
        """Take off what was put on: the batches of step `step` have passed."""
        self.within.close()
        for name, faults in self.faults.items():
            for fault in faults[:1]:
                words = f"{name} failed at step {step}, where a batch went without it: {fault.error}"
                self.log.fault(step, fault, words, alert="a correction of batches failed")
            if name not in self.terms:
                self.steps[name] = self.steps.get(name, 0) + 1
                self.log.progress.record_correction(name)
        self.faults.clear()

    def report(self, step: int) -> dict[str, float]:
        """Note what each came to since it was last told, and return it by its keys for trackers. Collective."""
        numbers: dict[str, float] = {}
        for one in self.corrections:
            if steps := self.steps.pop(one.name, 0):
                figures = dict(one.figures()) if isinstance(one, Tallied) else {}
                known = {name: figures.pop(name, float("nan")) for name in ("loss", "seconds")}
                reading = TermReading(1.0, known["loss"], steps, known["seconds"], figures=figures)
                self.log.note(gradient_entry(step, one.name, reading))
                numbers |= {term_key(one.name, figure): value for figure, value in reading.numbers().items()}
        return numbers
