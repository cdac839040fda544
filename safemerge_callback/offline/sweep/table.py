"""The table of a sweep: one cell a merge that was not made."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...decision import Readings
from ...io.outputs import FileKind, new_output
from ...io.paths import as_path
from ...io.text_table import Table, html_table, render

# Lines of text with commas between; no other text of ours or of JSON or markup.
TABLE = FileKind("a CSV table", lambda head: b"\0" not in head and re.match(rb"[^\n{[<]*,", head) is not None)


@dataclass(frozen=True)
class Cell:
    """One merge that was not made: which gate, how, and what it would do.

    `merged` of `modules` are selected. `moved`: ‖new - old‖/‖old‖, infinite where the old update is nothing, and
    `cosine`: that of the new update to the old one, the fine-tuned, both over all modules together. `residual`:
    ‖dropped‖/‖target‖ over the merged modules, what the rank loses.
    """

    gate: str
    knob: float | None
    method: str
    space: str
    weights: tuple[float, ...]
    merged: int
    modules: int
    moved: float
    cosine: float
    residual: float


class Sweep(Sequence[Cell]):
    """All cells, in the order gate, method, weights; prints as a table."""

    def __init__(self, cells: Iterable[Cell], readings: Readings) -> None:
        self._cells = tuple(cells)
        self.readings = readings

    def __getitem__(self, index: Any) -> Any:
        return self._cells[index]

    def __len__(self) -> int:
        return len(self._cells)

    def __str__(self) -> str:
        return render(*self._table())

    def __repr__(self) -> str:
        return f"Sweep({self._title()})"

    def _repr_html_(self) -> str:
        """The same table as a notebook shows it."""
        return html_table(*self._table())

    def _title(self) -> str:
        return f"{len(self)} merges of {len(self.readings)} modules, none of them made"

    def _table(self) -> Table:
        columns = ["gate", "method", "weights", "merged", "moved", "cosine to task", "residual"]
        return self._title(), columns, [_shown(cell) for cell in self], columns[3:]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a mapping a cell, by the fields' names."""
        return [asdict(cell) for cell in self]

    def write_csv(self, path: str | Path) -> Path:
        """Write one row a cell, numbers unrounded; ConfigError where the file cannot be written, or is no table now."""
        with new_output(path, "table", TABLE) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Cell)])
            writer.writeheader()
            writer.writerows({**asdict(cell), "weights": joined(cell.weights)} for cell in self)
        return as_path(path, "table")


def _shown(cell: Cell) -> list[str]:
    gate = cell.gate if cell.knob is None else f"{cell.gate} {cell.knob:g}"
    method = cell.method if cell.space == "delta" else f"{cell.method} ({cell.space})"
    counts = f"{cell.merged} of {cell.modules}"
    return [
        gate,
        method,
        joined(cell.weights),
        counts,
        f"{cell.moved:.4f}",
        f"{cell.cosine:.4f}",
        f"{cell.residual:.4f}",
    ]


def joined(weights: Sequence[float]) -> str:
    """Return `0.8/0.2`."""
    return "/".join(f"{weight:g}" for weight in weights)
