"""A module at a check, and the cosines of a run so far in as many columns as a chart can bear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# W&B draws a custom chart from 10,000 rows at the most.
MOST_CELLS = 9_000
MOST_COLUMNS = 60


class Row(NamedTuple):
    """One module at one check, a row of the decisions table; None where there is no such number.

    `layer` and `type`: the module's name taken apart. `z`: how many standard deviations `cosine` lies from
    `null_cosine`. `limit`: the cosine below which the gate merges this module. `task_weight`: the share of the task's
    update that all merges so far have left. `moved`: how far the update goes along V.
    """

    step: int
    layer: int | None
    type: str
    module: str
    cosine: float | None
    null_cosine: float | None
    z: float | None
    limit: float | None
    update_norm: float | None
    task_weight: float
    merged: bool
    reason: str
    moved: float | None = None

    @property
    def below(self) -> bool:
        """Whether the module lies below the gate."""
        return self.cosine is not None and self.limit is not None and self.cosine < self.limit


COLUMNS = Row._fields


class ColumnCell(NamedTuple):
    """One module in one column; `merged` if it was merged at any of the column's checks."""

    step: int
    layer: int | None
    type: str
    cosine: float | None
    limit: float | None
    merged: bool
    moved: float | None = None


class Drift:
    """Columns of one or more checks each; a column shows its last check. Memory and pictures stay bounded.

    Where a column too many would come, all are joined by twos, so every column but the last stands for as many checks.
    """

    def __init__(self) -> None:
        self.columns: list[dict[str, ColumnCell]] = []
        self.checks = 0
        self.checks_a_column = 1
        self.shown = False

    def add(self, rows: Sequence[Row]) -> None:
        """Take in the rows of one check."""
        if not rows:
            return
        cells = {r.module: ColumnCell(r.step, r.layer, r.type, r.cosine, r.limit, r.merged, r.moved) for r in rows}
        if self.checks % self.checks_a_column:
            self.columns[-1] = _joined(self.columns[-1], cells)
        else:
            self.columns.append(cells)
        self.checks += 1
        self.shown = False
        if len(self.columns) > max(2, min(MOST_COLUMNS, MOST_CELLS // len(rows))):
            self._halve()

    @property
    def due(self) -> bool:
        """Whether this check is a power of two: to draw all checks anew then costs no more than twice the last time."""
        return self.checks.bit_count() == 1

    @property
    def cells(self) -> list[ColumnCell]:
        """Every cell, column by column."""
        return [cell for column in self.columns for cell in column.values()]

    def _halve(self) -> None:
        pairs = (self.columns[at : at + 2] for at in range(0, len(self.columns), 2))
        self.columns = [_joined(pair[0], pair[-1]) for pair in pairs]
        self.checks_a_column *= 2


def _joined(old: dict[str, ColumnCell], new: dict[str, ColumnCell]) -> dict[str, ColumnCell]:
    """`new` over `old`, the merges of both kept."""
    merged = {name for name, cell in old.items() if cell.merged}
    return {**old, **{name: cell._replace(merged=cell.merged or name in merged) for name, cell in new.items()}}
