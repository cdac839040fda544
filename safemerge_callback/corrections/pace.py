"""How often a gradient term comes: every so many steps, more seldom while it is not needed, and never too dear."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from ..live.ranks import from_first
from .schedule import Schedule, interval

# Times of a term and of the steps around it, of which the medians say what it costs; the first is of no use.
_TIMES = 5
# The share of the training's time, and the seconds of what is left of a run, above which a term is called dear.
DEAR, WORTH_TELLING = 0.15, 60.0


class Cost(NamedTuple):
    """What a term takes: seconds a time, and the seconds of a step of the task without it."""

    term: float
    step: float

    def share(self, every: int) -> float:
        """Return its share of the time where it comes every so many steps."""
        return self.term / (self.term + every * self.step)

    def least(self, share: float) -> int:
        """Return the shortest interval at which it takes no more than a share."""
        wanted = self.term * (1 - share) / (share * self.step) if self.step > 0 else 1.0
        return max(1, math.ceil(wanted))


@dataclass
class Pace:
    """When a term is due: its schedule, with the interval doubled after each time it was not needed, up to `longest`.

    One time it was needed brings the shortest interval back. `max_share`: the share of the training's time that it may
    take: the interval is never shorter than `least`, the steps that keep the share, once what it takes was measured
    over its first times. None of that without `by_need`, and without `max_share`: then no clock decides anything.
    `cost` is measured whatever `max_share` is, on the first rank; None until then.
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
    cost: Cost | None = None

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
        """Return the time at which the term begins; 0 where it is not measured any more."""
        return 0.0 if self.measured else self.clock()

    def end(self, step: int, max_steps: int, began: float, *, needed: bool) -> bool:
        """Take note that the term has come at `step`, and whether it was needed; every rank calls it alike.

        Returns whether this was the time with which its cost is measured.
        """
        if self.by_need:
            self.factor = 1 if needed else min(2 * self.factor, self.longest)
        now = not self.measured and self._measure(step, began)
        self.next_step = step + self.spacing(max_steps)
        return now

    def spacing(self, max_steps: int) -> int:
        """Return the interval in force, in steps of a run of `max_steps`."""
        every = max(1, interval(self.schedule.every, max_steps))
        return every * max(self.factor, math.ceil(self.least / every))

    def dear(self, step: int, max_steps: int) -> float | None:
        """Return its share of the time at the interval in force, where that is above `DEAR` and is worth telling.

        None where it is not, or not known: where what is left of it takes no more than a minute, nobody waits for it.
        """
        every = self.spacing(max_steps)
        if self.cost is None or (max_steps - step) / every * self.cost.term < WORTH_TELLING:
            return None
        share = self.cost.share(every)
        return share if share > DEAR else None

    def _measure(self, step: int, began: float) -> bool:
        self.times.append((step, began, self.clock()))
        if len(self.times) <= _TIMES:
            return False
        self.measured, self.cost = True, from_first(self._cost())
        if self.max_share is not None:
            self.least = self.cost.least(self.max_share)
        self.times.clear()
        return True

    def _cost(self) -> Cost:
        """The medians of its times, and of the steps of the task between one and the next."""
        term = statistics.median(end - began for _, began, end in self.times[1:])
        step = statistics.median((then[1] - now[2]) / (then[0] - now[0]) for now, then in pairwise(self.times))
        return Cost(term, step)

    def state(self) -> dict[str, int | bool]:
        """Return what a checkpoint must hold of it."""
        return {"factor": self.factor, "least": self.least, "next_step": self.next_step, "measured": self.measured}
