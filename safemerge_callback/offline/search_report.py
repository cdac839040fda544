"""What a search of coefficients found, as a table and as the points of a front."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..io.text_table import Table, html_table, render
from ..signals.coefficients import Learned, SearchSettings, Step
from ..signals.merge_problem import Evaluation


class Achieved(NamedTuple):
    """What the adapter that was written costs: after the cut to its rank, and rounding."""

    task: float
    safety: float


@dataclass(frozen=True)
class SearchReport:
    """What was learned by which settings, on how many rows of each kind, where it lies, and what was achieved there.

    `achieved` is None where nothing was merged. `resumed`: evaluations that an earlier, killed search had made.
    `peak_bytes`: the most memory that the process has had, or its device; None where the system does not say.
    """

    learned: Learned
    settings: SearchSettings
    output: Path
    task_rows: int
    safety_rows: int
    resumed: int = 0
    achieved: Achieved | None = None
    peak_bytes: int | None = None

    @property
    def all_rows(self) -> list[Evaluation]:
        """The evaluations of all rows: the points of the front of task against safety."""
        return [one for one in self.learned.trace if one.batch is None]

    def __str__(self) -> str:
        return "\n".join([render(*self._table()), *self.lines()])

    def _repr_html_(self) -> str:
        """The same table as a notebook shows it."""
        return html_table(*self._table())

    def to_dict(self) -> dict[str, Any]:
        """Return what was learned, what of it was taken, and the cost, as JSON has it."""
        learned, names = self.learned, ("label", "before", "after", "single", "coefficients", "merged")
        steps = [{name: getattr(step, name) for name in names} for step in learned.steps]
        cost = {"evaluations": len(learned.trace), "resumed": self.resumed, "seconds": learned.seconds}
        rows = {"task_rows": self.task_rows, "safety_rows": self.safety_rows, "peak_bytes": self.peak_bytes}
        outcome = {"improved": learned.improved, "before": learned.before, "after": learned.after}
        return {**outcome, "achieved": self.achieved, "steps": steps, "notes": learned.notes, **rows, **cost}

    def lines(self) -> Iterator[str]:
        """Give what the table does not say: what was taken, what was noticed, and the cost."""
        learned = self.learned
        for step in learned.steps:
            if step.merged and len(step.coefficients) > 1 and step.single is not None:
                yield f"{step.label}: λ {_spread(list(step.coefficients.values()))}"
        for note in learned.notes:
            yield f"note: {note}"
        kept = "" if learned.improved else "; the fine-tuned adapter is returned as it was"
        resumed = f", {self.resumed} of them made before" if self.resumed else ""
        memory = "" if self.peak_bytes is None else f", {self.peak_bytes / 2**30:.2f} GiB at most"
        yield (
            f"{len(learned.trace)} evaluations{resumed}: {learned.forward} rows forward, {learned.backward} backward, "
            f"{learned.seconds:.1f} s{memory}; {self.task_rows} task rows, {self.safety_rows} safety rows{kept}"
        )

    def _table(self) -> Table:
        settings = self.settings
        rows = [_row("fine-tuned", "0", self._first(), settings.share)]
        for step in self.learned.steps:
            rows += list(self._rows_of(step))
        if self.achieved is not None:
            rows.append(_numbers("as written", "", *self.achieved, settings.share))
        title = f"objective {settings.objective}, granularity {settings.granularity}, μ {settings.share:g}"
        columns = ["merge", "λ", "task", "safety", "J"]
        return title, columns, rows, columns[1:]

    def _first(self) -> Evaluation:
        return self.learned.trace[0]

    def _rows_of(self, step: Step) -> Iterator[list[str]]:
        """The best single coefficient, the control, and the best of more."""
        taken = "" if step.merged else ", not taken"
        one = self._at(step.single_value, f"one {step.label}")
        if one is not None and step.single is not None:
            yield _row(f"one λ: {step.label}{taken}", f"{step.single:.3f}", one, self.settings.share)
        if one is None or len(step.coefficients) > 1:
            best = min(
                (e for e in self.all_rows if e.stage in (f"{self.settings.granularity} {step.label}", "mixture")),
                key=lambda e: e.value,
                default=None,
            )
            if best is not None:
                numbers = list(step.coefficients.values())
                how = "in closed form" if one is None else f"{len(numbers)} λ"
                yield _row(f"{how}: {step.label}{taken}", _spread(numbers), best, self.settings.share)

    def _at(self, value: float | None, stage: str) -> Evaluation | None:
        return next((e for e in self.all_rows if e.stage == stage and e.value == value), None)


def _row(name: str, numbers: str, one: Evaluation, share: float) -> list[str]:
    return _numbers(name, numbers, one.task, one.safety, share)


def _numbers(name: str, numbers: str, task: float, safety: float, share: float) -> list[str]:
    return [name, numbers, f"{task:.4f}", f"{safety:.4f}", f"{task + share * safety:.4f}"]


def _spread(numbers: Sequence[float]) -> str:
    return f"{statistics.fmean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"
