"""How often a gradient term comes: every so many steps, more seldom while it is not needed, and never too dear."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from ..live.ranks import from_first
from .schedule import Schedule, interval

# Times of a term and of the steps around it, of which the medians say what it costs; the first is of no use.
_TIMES = 5


@dataclass
class Pace:
    """When a term is due: its schedule, with the interval doubled after each time it was not needed, up to `longest`.

    One time it was needed brings the shortest interval back. `max_share`: the share of the training's time that it may
    take; what it takes is measured over its first times on the first rank, and the interval is never shorter after
    that than `least`, the steps that keep the share. None of that without `by_need`, and without `max_share`.
    """

    schedule: Schedule
    by_need: bool = False
    longest: int = 8
    max_share: float | None = None
    factor: int = 1
    least: int = 1
    next_step: int = 0
    clock: Callable[[], float] = time.perf_counter
    times: list[tuple[int, float, float]] = field(default_factory=list)
    measured: bool = False

    def __str__(self) -> str:
        """The schedule, as it is set."""
        return str(self.schedule)

    def ever(self, max_steps: int) -> bool:
        """Return whether it is due anywhere in a run of `max_steps`."""
        return self.schedule.ever(max_steps)

    def due(self, step: int, max_steps: int, *, last: bool = False) -> bool:
        """Return whether it is due at `step` of `max_steps`."""
        return step >= self.next_step and self.schedule.due(step, max_steps, last=last)

    def begin(self) -> float:
        """Return the time at which the term begins; 0 where it is not measured."""
        return self.clock() if self.measures else 0.0

    @property
    def measures(self) -> bool:
        """Whether it is still to be measured what the term takes."""
        return self.max_share is not None and not self.measured

    def end(self, step: int, max_steps: int, began: float, *, needed: bool) -> None:
        """Take note that the term has come at `step`, and whether it was needed; every rank calls it alike."""
        if self.by_need:
            self.factor = 1 if needed else min(2 * self.factor, self.longest)
        if self.measures:
            self._measure(step, began)
        self.next_step = step + self.spacing(max_steps)

    def spacing(self, max_steps: int) -> int:
        """Return the interval in force, in steps of a run of `max_steps`."""
        every = max(1, interval(self.schedule.every, max_steps))
        return every * max(self.factor, math.ceil(self.least / every))

    def _measure(self, step: int, began: float) -> None:
        self.times.append((step, began, self.clock()))
        if len(self.times) <= _TIMES:
            return
        self.least, self.measured = from_first(self._least()), True
        self.times.clear()

    def _least(self) -> int:
        """The shortest interval that keeps the share: i steps of the task, and one time of the term among them."""
        assert self.max_share is not None
        cost = statistics.median(end - began for _, began, end in self.times[1:])
        task = statistics.median((then[1] - now[2]) / (then[0] - now[0]) for now, then in pairwise(self.times))
        wanted = cost * (1 - self.max_share) / (self.max_share * task) if task > 0 else 1.0
        return max(1, math.ceil(wanted))

    def state(self) -> dict[str, int | bool]:
        """Return what a checkpoint must hold of it."""
        return {"factor": self.factor, "least": self.least, "next_step": self.next_step, "measured": self.measured}
