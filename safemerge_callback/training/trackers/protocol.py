"""What a tracker is given, a row a module among it, and what it must be able to do with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ...adapters.names import layer_and_type
from ...decision import MergePlan
from ...record.metrics import limit_of, z_of
from .columns import Drift, Row


@dataclass(frozen=True)
class Report:
    """One check: metrics as in `METRICS`, a `Row` a module, whether it is the run's last."""

    step: int
    metrics: Mapping[str, float]
    rows: Sequence[Row] = ()
    final: bool = False


@dataclass(frozen=True)
class Run:
    """The run that is tracked: the folder that the trainer writes to, and our settings."""

    folder: Path
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """One tracker of one run, made from a `Run`. It attaches to what is live, and never starts nor ends it.

    A tracker keeps no count of its failures: whatever a method raises is caught, and told once, by `Trackers`. It
    raises TrackerError itself where there is no live run.
    """

    takes_files: ClassVar[bool]

    def check(self, report: Report) -> None:
        """Send one check: numbers, and the table or histogram where the tracker has such a thing."""

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send scalars under the optimizer step."""

    def heat_map(self, step: int, drift: Drift) -> None:
        """Send the picture of all checks so far, or the table that the tracker draws one from."""

    def alert(self, step: int, title: str, text: str) -> None:
        """Tell a person; the title is shorter than 64 characters."""

    def files(self, step: int, folder: Path) -> None:
        """Keep the files of `folder` with the run; called where `takes_files` is true."""

    def close(self) -> None:
        """Give back what the tracker opened itself."""


def finite(value: float | None) -> float | None:
    """Return `value`, or None where it is NaN or infinite: tables and JSON hold no such number."""
    return value if value is not None and math.isfinite(value) else None


def decision_rows(step: int, plan: MergePlan, task_weights: Mapping[str, float]) -> list[Row]:
    """Return a row of the trackers' table for each module; `task_weights` after this check's merges."""
    return [
        Row(
            step,
            *layer_and_type(name),
            name,
            finite(reading.cosine),
            finite(reading.null_cosine),
            finite(z_of(reading)),
            limit_of(plan, reading),
            finite(reading.update_norm),
            task_weights.get(name, 1.0),
            *plan.verdicts[name],
            finite(reading.moved),
        )
        for name, reading in plan.readings.items()
    ]
