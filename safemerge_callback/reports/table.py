"""What the terminal shows as a table: a history, one measurement (as JSON, too), the figures of a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..decision import BAND, Readings
from ..evaluation.measure import Share
from ..evaluation.units import amount
from ..io.printable import printable
from ..io.text_table import render
from ..record.history import MERGE, Cell, History
from ..signals.thoughts import ADVICE
from .layout import Panel, panels
from .terms import Course, courses, loss_words, share_words
from .words import change_counts, correction_words, counted

_COLUMNS = ("type", "modules", "moved", "null", "first", "last", "lowest", "where")
_WORDS = ("type", "where")
_TERM = ("name", "last_step", "steps", "seconds", "losses")
_KINDS = {"harm": "harm (higher is safer)", "over_refusal": "over-refusal (lower is better)", "task": "utility"}
_FIGURE_COLUMNS = ("kind", "measure", "judge", "n", "value", "95 % interval", "incoherent", "unjudged")
_RIGHT = ("n", "value", "95 % interval", "incoherent", "unjudged")


def summary(history: History) -> str:
    """Return the run in a few lines and a table, a line for each module type.

    `moved` is the mean over the type's modules of how far their updates go along V at the last check, left out where
    the journal does not say. `null`, `first` and `last` are medians of the null cosine and of the cosines at the type's
    first and last check;
    `lowest` is the lowest cosine of any module, `where` its module and step; `merges`, and a
    column of its own for each other correction, count modules times events;
    `task left` is the smallest share of the task's update that merging left in a module. Gradient terms follow, and the
    last probe.
    """
    if not history.steps:
        probed = "" if history.terms and not history.probes else f", {counted(history.probes, 'probe')}"
        head = f"{history.title}: no check{probed}{_cost(history)}"
        return "\n".join(map(printable, [head, *_closing_lines(history)]))
    steps = history.steps
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    sizes = counted(history.modules, "module")
    sizes += f", {counted(history.checks, 'check')}" if history.checks else " changed"
    title = ", ".join(filter(None, (f"{history.title}: {sizes} at {span}", history.rule)))
    done = correction_words(history)
    if history.how:
        done[MERGE] += f": {history.how}"
    lines = [_types_table(history, title)]
    if history.moved:
        step, mean = max(history.moved.items())
        lines.insert(0, f"moved {mean:+z.2f} on average at step {step}, {history.moved_words}")
    lines.append(printable("; ".join([*done.values(), f"{history.seconds:.1f} s in all"])))
    return "\n".join([*lines, *map(printable, _closing_lines(history))])


def _closing_lines(history: History) -> Iterator[str]:
    """The gradient terms, the last probe, all its measures together, and the faults."""
    for course in courses(history):
        yield from _term_lines(history, course)
    if history.probes:
        probe = history.probes[-1]
        figures = "; ".join(f"{m.measure} {m.text}" for m in probe.measures)
        yield f"probe at step {probe.step} ({probe.when}): {figures}"
    if history.faults:
        yield f"{counted(history.faults, 'fault')}, the first: {history.faults[0]}"


def _cost(history: History) -> str:
    """What the callback took in all, once the run is over."""
    seconds = history.end.get("seconds")
    return "" if seconds is None else f"; {seconds:.1f} s in all{share_words(history, seconds)}"


def _term_lines(history: History, course: Course) -> Iterator[str]:
    """What a gradient term did and took, its losses from the first reading to the last, and its gradient."""
    cost = f"{course.seconds:.1f} s{share_words(history, course.seconds)}"
    yield f"{course.name}: in {course.size} until step {course.last_step}, {course.settings}; {cost}"
    yield "  " + ", ".join(f"{name} {loss_words(losses)}" for name, losses in course.losses.items())
    last = {"gradient norm": course.norms, "cosine to the task's": course.cosines}
    known = [f"{what} {numbers[max(numbers)]:.3g} at step {max(numbers)}" for what, numbers in last.items() if numbers]
    if known:
        yield "  " + ", ".join(known)


def _types_table(history: History, title: str) -> str:
    """A line a module type; a column for each correction says how often it changed the type's modules."""
    measured = [name for name in _COLUMNS if name != "moved" or history.moved]
    columns = measured if history.cells else [name for name in _COLUMNS if name in ("type", "modules")]
    counts = change_counts(history)
    rows = []
    for panel in panels(history.modules):
        row = _row(history, panel)
        changes = [str(sum(count[name] for name in panel.modules)) for count in counts.values()]
        rows.append([*(row[name] for name in columns), *changes, f"{_task_left(history, panel):.3g}"])
    heads = [*columns, *counts, "task left"]
    return render(title, heads, rows, right=[name for name in heads if name not in _WORDS])


def summary_document(history: History) -> dict[str, Any]:
    """Return what `summary` tells as JSON has it: numbers in place of words, null where there is none."""
    probe = history.probes[-1] if history.probes else None
    steps = [*history.steps[:1], *history.steps[-1:]]
    return {
        "run": history.title,
        "modules": len(history.modules),
        "checks": len(history.checks),
        "steps": steps,
        "gate": history.gate or None,
        "knob": history.knob,
        "how": history.how or None,
        "moved": history.moved[max(history.moved)] if history.moved else None,
        "types": [_type(history, panel) for panel in panels(history.modules)],
        "terms": [{name: getattr(one, name) for name in _TERM} for one in courses(history)],
        "probe": probe and {"step": probe.step, "when": probe.when, "measures": probe.measures},
        "seconds": history.end.get("seconds", history.seconds),
        "faults": history.faults,
    }


def _type(history: History, panel: Panel) -> dict[str, Any]:
    """A module type in numbers."""
    counts = {name: sum(count[one] for one in panel.modules) for name, count in change_counts(history).items()}
    return {**_numbers(history, panel)._asdict(), "changes": counts, "task_left": _task_left(history, panel)}


class _Numbers(NamedTuple):
    """A module type as it was measured; NaN, and no lowest, where nothing was."""

    type: str
    modules: int
    moved: float
    null: float
    first: float
    last: float
    lowest: float
    module: str | None
    step: int | None


def _task_left(history: History, panel: Panel) -> float:
    """The smallest share of the task's update that merging left in a module of the type."""
    left = [history.task_weights.get(name, {}) for name in panel.modules]
    return min((share for shares in left for share in shares.values()), default=1.0)


def _row(history: History, panel: Panel) -> dict[str, str]:
    numbers = _numbers(history, panel)
    where = "-" if numbers.module is None else f"{numbers.module} at {numbers.step}"
    cosines = {name: _in_four_digits(getattr(numbers, name)) for name in ("null", "first", "last", "lowest")}
    moved = f"{numbers.moved:+z.2f}" if math.isfinite(numbers.moved) else "-"
    return {"type": numbers.type, "modules": str(numbers.modules), "moved": moved, **cosines, "where": where}


def _in_four_digits(number: float) -> str:
    return f"{number:.4f}" if number == number else "-"


def _numbers(history: History, panel: Panel) -> _Numbers:
    cells = {key: cell for name in panel.modules for key, cell in _cells_of(history, name)}
    measured = {key: cell for key, cell in cells.items() if cell.state == "measured"}
    lowest = min(measured, key=lambda key: measured[key].cosine, default=None)
    steps = sorted({step for _, step in measured}) or [0]
    first, last = ([cell for (_, at), cell in measured.items() if at == step] for step in (steps[0], steps[-1]))
    moved = [cell.moved for cell in last]
    return _Numbers(
        type=panel.title,
        modules=len(panel.modules),
        moved=statistics.fmean(moved) if moved and all(map(math.isfinite, moved)) else math.nan,
        null=_median(cell.null_cosine for cell in cells.values()),
        first=_median(cell.cosine for cell in first),
        last=_median(cell.cosine for cell in last),
        lowest=measured[lowest].cosine if lowest else math.nan,
        module=lowest[0] if lowest else None,
        step=lowest[1] if lowest else None,
    )


def _cells_of(history: History, name: str) -> list[tuple[tuple[str, int], Cell]]:
    keys = [(name, step) for step in history.steps]
    return [(key, history.cells[key]) for key in keys if key in history.cells]


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if value == value]
    return statistics.median(finite) if finite else math.nan


def figures_text(figures: Sequence[Share], title: str) -> str:
    """Return the figures as one table, harm first and utility last."""
    rows = [_figure_row(figure) for kind in _KINDS for figure in figures if figure["kind"] == kind]
    return render(title, _FIGURE_COLUMNS, rows, _RIGHT)


def thoughts_lines(figures: Sequence[Share]) -> list[str]:
    """Return a line for each prompt set whose responses held thoughts: how many were cut, how many never ended."""
    sets = {figure["measure"].rpartition("_")[0]: figure for figure in figures if figure["thoughts"]}
    return [
        f"{name}: thoughts cut from {one['thoughts']} responses{_never(one['unfinished'])}"
        for name, one in sets.items()
    ]


def _never(unfinished: int) -> str:
    return f"; {unfinished} ended within one and were not judged: {ADVICE}" if unfinished else ""


def _figure_row(figure: Share) -> tuple[str, ...]:
    value, low, high = figure["value"], figure["low"], figure["high"]
    unit = figure["unit"]
    interval = "" if low is None or high is None else f"{amount(low, unit, '%')} to {amount(high, unit, '%')}"
    counts = (str(figure["incoherent"]), str(figure["unjudged"])) if figure["kind"] != "task" else ("", "")
    shown = "nothing judged" if value is None else amount(value, unit, "%")
    return _KINDS[figure["kind"]], figure["measure"], figure["judge"] or "", str(figure["n"]), shown, interval, *counts


def readings_text(readings: Readings, threshold: float | None) -> str:
    """Return the readings as a table, and beneath it the modules whose cosine is below `threshold`."""
    if threshold is None:
        return str(readings)
    below = readings.below(threshold)
    return "\n".join(
        [str(readings), f"{len(below)} of {len(readings)} modules below {threshold:g}", *map(printable, below)]
    )


def readings_document(readings: Readings, threshold: float | None) -> dict[str, Any]:
    """Return the readings as JSON has them; NaN becomes null, which JSON has a word for."""
    modules = [
        {
            "name": name,
            "moved": reading.moved,
            "cosine": _finite(reading.cosine),
            "null_cosine": _finite(reading.null_cosine),
            "signed_cosine": reading.signed_cosine,
            "signed_z": reading.signed_z,
            "update_norm": _finite(reading.update_norm),
            "rank": reading.rank,
            "shape": list(reading.shape),
        }
        for name, reading in readings.items()
    ]
    limits = {} if threshold is None else {"threshold": threshold, "below": readings.below(threshold)}
    lead = {"moved_mean": readings.moved_mean, "moved_edge": BAND.edge}
    return {**lead, **limits, "modules": modules}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
