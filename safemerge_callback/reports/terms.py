"""What gradient terms came to over a run, in numbers and words: those of the table, watch, plots and page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ..record.history import History, TermReading
from .words import several

# Figures of a term that a report knows what to do with: rows are added up, losses by kind are drawn.
ROWS, BY_KIND = "rows", "loss_"
LOSS = "loss"


class Course(NamedTuple):
    """A gradient term over a run: its readings by step, ascending, one at least."""

    name: str
    readings: Mapping[int, TermReading]

    @property
    def first(self) -> TermReading:
        """The first reading."""
        return next(iter(self.readings.values()))

    @property
    def last(self) -> TermReading:
        """The last reading."""
        return self.readings[self.last_step]

    @property
    def last_step(self) -> int:
        """The step of the last reading."""
        return max(self.readings)

    @property
    def steps(self) -> int:
        """How many steps had its gradient."""
        return sum(reading.steps for reading in self.readings.values())

    @property
    def seconds(self) -> float:
        """What its passes took; older lines do not say."""
        return math.fsum(reading.seconds for reading in self.readings.values() if math.isfinite(reading.seconds))

    @property
    def rows(self) -> int | None:
        """How many rows it has shown the model; None where it does not count them."""
        counts = [reading.figures[ROWS] for reading in self.readings.values() if ROWS in reading.figures]
        return round(math.fsum(count for count in counts if math.isfinite(count))) if counts else None

    @property
    def losses(self) -> dict[str, dict[int, float]]:
        """The mean loss, as `loss`, and that of each kind of rows by its name: step -> loss, NaN where not known."""
        kinds = [name for name in self.figure_names if name.startswith(BY_KIND)]
        by_kind = {
            kind.removeprefix(BY_KIND).replace("_", " "): {
                step: reading.figures.get(kind, math.nan) for step, reading in self.readings.items()
            }
            for kind in kinds
        }
        return {LOSS: {step: reading.loss for step, reading in self.readings.items()}, **by_kind}

    @property
    def norms(self) -> dict[int, float]:
        """Step -> the norm of its weighted gradient, where it is known."""
        return _known({step: reading.norm for step, reading in self.readings.items()})

    @property
    def cosines(self) -> dict[int, float]:
        """Step -> the cosine of that gradient and the task's, where it is known."""
        return _known({step: reading.cosine for step, reading in self.readings.items()})

    @property
    def figure_names(self) -> list[str]:
        """Every figure of any reading, in alphabetical order."""
        return sorted({name for reading in self.readings.values() for name in reading.figures})

    @property
    def size(self) -> str:
        """As `60 steps, 120 rows`."""
        rows = "" if self.rows is None else f", {several(self.rows, 'row')}"
        return f"{several(self.steps, 'step')}{rows}"

    @property
    def settings(self) -> str:
        """Its weight and what else it says of itself at the last reading: `weight 1, interval 8`."""
        others = {name: value for name, value in self.last.figures.items() if name != ROWS and BY_KIND not in name}
        return ", ".join(
            f"{name.replace('_', ' ')} {value:g}" for name, value in {"weight": self.last.weight, **others}.items()
        )


def courses(history: History) -> list[Course]:
    """Return the gradient terms of a run, in the order of the journal."""
    return [Course(name, dict(sorted(readings.items()))) for name, readings in history.terms.items() if readings]


def loss_words(losses: Mapping[int, float]) -> str:
    """Return the first and the last of some losses that are known: `0.012 to 0.003`, or the only one."""
    known = list(_known(losses).values())
    ends = known if len(known) < 2 else [known[0], known[-1]]
    return " to ".join(f"{loss:.3g}" for loss in ends) or "not known"


def share_words(history: History, seconds: float) -> str:
    """Return which share of the training that was, once it is over: `, 12.3 % of the training`; else nothing."""
    whole = history.end.get("training_seconds")
    return f", {seconds / whole:.1%} of the training" if whole else ""


def _known(numbers: Mapping[int, float]) -> dict[int, float]:
    return {step: number for step, number in numbers.items() if math.isfinite(number)}
