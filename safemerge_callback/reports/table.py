"""A history as a table: one line a module type, because 224 lines are no summary."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator

from ..io.printable import printable
from ..io.text_table import render
from ..record.history import Cell, History
from .counted import counted
from .layout import Panel, panels

_COLUMNS = ("type", "modules", "moved", "null", "first", "last", "lowest", "where", "merges", "task left")


def summary(history: History) -> str:
    """Return the run in a few lines and a table, a line for each module type.

    `moved` is the mean over the type's modules of how far their updates go along V at the last check, left out where
    the journal does not say. `null`, `first` and `last` are medians of the null cosine and of the cosines at the type's
    first and last check;
    `lowest` is the lowest cosine of any module, `where` its module and step; `merges` counts modules times events;
    `task left` is the smallest share of the task's update that merging left in a module. The last probe follows.
    """
    if not history.steps:
        return "\n".join(
            [
                f"{printable(history.title)}: no check, {counted(history.probes, 'probe')}",
                *map(printable, _told(history)),
            ]
        )
    steps = history.steps
    columns = [name for name in _COLUMNS if name != "moved" or history.moved]
    rows = [[row[name] for name in columns] for row in (_row(history, panel) for panel in panels(history.modules))]
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    title = (
        f"{history.title}: {counted(history.modules, 'module')}, {counted(steps, 'check')} at {span}, {history.rule}"
    )
    back = f", {len(history.undone)} taken back" if history.undone else ""
    merged = f"{counted(history.merges, 'merge')} in {counted(history.merged_modules, 'module')}{back}"
    lines = [render(title, columns, rows, right=[name for name in columns if name not in ("type", "where")])]
    if history.moved:
        step, mean = max(history.moved.items())
        lines.insert(0, f"moved {mean:+z.2f} on average at step {step}, {history.moved_words}")
    lines.append(printable(f"{merged}{f': {history.how}' if history.how else ''}; {history.seconds:.1f} s in all"))
    return "\n".join([*lines, *map(printable, _told(history))])


def _told(history: History) -> Iterator[str]:
    """The last probe, all its measures together, and the faults."""
    if history.probes:
        probe = history.probes[-1]
        figures = "; ".join(f"{m.measure} {m.text}" for m in probe.measures)
        yield f"probe at step {probe.step} ({probe.when}): {figures}"
    if history.faults:
        yield f"{counted(history.faults, 'fault')}, the first: {history.faults[0]}"


def _row(history: History, panel: Panel) -> dict[str, str]:
    cells = {key: cell for name in panel.modules for key, cell in _cells_of(history, name)}
    measured = {key: cell for key, cell in cells.items() if cell.state == "measured"}
    left = [share for name in panel.modules for share in history.task_weights.get(name, {}).values()]
    lowest = min(measured, key=lambda key: measured[key].cosine, default=None)
    steps = sorted({step for _, step in measured}) or [0]
    first, last = ([cell for (_, at), cell in measured.items() if at == step] for step in (steps[0], steps[-1]))
    moved = [cell.moved for cell in last]
    return {
        "type": panel.title,
        "modules": str(len(panel.modules)),
        "moved": f"{statistics.fmean(moved):+z.2f}" if moved and all(map(math.isfinite, moved)) else "-",
        "null": _median(cell.null_cosine for cell in cells.values()),
        "first": _median(cell.cosine for cell in first),
        "last": _median(cell.cosine for cell in last),
        "lowest": f"{measured[lowest].cosine:.4f}" if lowest else "-",
        "where": f"{lowest[0]} at {lowest[1]}" if lowest else "-",
        "merges": str(len(left)),
        "task left": f"{min(left, default=1.0):.3g}",
    }


def _cells_of(history: History, name: str) -> list[tuple[tuple[str, int], Cell]]:
    keys = [(name, step) for step in history.steps]
    return [(key, history.cells[key]) for key in keys if key in history.cells]


def _median(values: Iterable[float]) -> str:
    finite = [value for value in values if value == value]
    return f"{statistics.median(finite):.4f}" if finite else "-"
