"""A history as the compact JSON that the page draws from: numbers as ten-thousandths, words once.

Apart from the page: it is a format of its own, which `page/data.js` reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..decision import BAND
from ..record.history import Cell, History, Measured
from .layout import panels
from .terms import ROWS, Course, courses
from .words import changed_words, mark_words

SCALE = 10_000
_BROKEN, _STILL = -1, -2
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def page_data(history: History) -> dict[str, Any]:
    """Return the history as JSON-ready values, modules in the order of their panels.

    A cosine, a null cosine, a limit or a share is an integer number of ten-thousandths, None where there is none; a
    cosine of -1 is not finite, one of -2 has nothing to compare with. `steps` are the checks; modules point into it.
    """
    parts = panels(history.modules)
    templates: dict[str, int] = {}
    modules = [
        {"name": name, "panel": index, "label": label, **_module(history, name, templates)}
        for index, part in enumerate(parts)
        for name, label in zip(part.modules, part.labels, strict=True)
    ]
    return {
        "title": history.title,
        "gate": history.gate,
        "threshold": thousandths(history.limit),
        "moved": {"edge": BAND.edge, "means": [_rounded(history.moved.get(step, math.nan)) for step in history.steps]},
        "steps": history.steps,
        "panels": [part.title for part in parts],
        "modules": modules,
        **({"mark": mark_words(history)} if history.corrections else {}),
        "templates": list(templates),
        "probes": [
            {"step": p.step, "when": p.when, "measures": [_measure(m) for m in p.measures]} for p in history.probes
        ],
        **({"terms": terms} if (terms := [_term(course) for course in courses(history)]) else {}),
        "events": [{"step": e.step, "kind": e.kind, "reason": e.reason} for e in history.events],
    }


def thousandths(number: float) -> int | None:
    """Return a number as ten-thousandths, rounded; None for one that is not finite."""
    return round(number * SCALE) if math.isfinite(number * SCALE) else None


def _term(course: Course) -> dict[str, Any]:
    """A gradient term by reading: step, over how many steps, of how many rows, its losses, norm and cosine."""
    readings = course.readings.values()
    numbers = {"norm": [reading.norm for reading in readings], "cosine": [reading.cosine for reading in readings]}
    return {
        "name": course.name,
        "steps": list(course.readings),
        "counts": [reading.steps for reading in readings],
        "rows": [_rounded(reading.figures.get(ROWS, math.nan)) for reading in readings],
        "losses": {name: list(map(_short, losses.values())) for name, losses in course.losses.items()},
        **{name: list(map(_short, values)) for name, values in numbers.items() if any(map(math.isfinite, values))},
    }


def _module(history: History, name: str, templates: dict[str, int]) -> dict[str, Any]:
    cells, steps = history.by_module[name], history.steps
    at = {step: index for index, step in enumerate(steps)}
    left = history.task_weights.get(name, {})
    row = [cells.get(step) for step in steps]
    words, numbers = _reasons(row, templates)
    return {
        "cosine": [_cosine(cell) for cell in row],
        "null": _same([thousandths(cell.null_cosine) if cell else None for cell in row]),
        "limit": _same([thousandths(cell.limit) if cell else None for cell in row]),
        "words": _same(words),
        "numbers": numbers,
        "merged": [at[step] for step in left],
        "left": [thousandths(share) for share in left.values()],
        "lost": [thousandths(history.residuals.get((name, step), math.nan)) for step in left],
        "undone": [at[step] for step in left if (name, step) in history.undone],
        **_other_changes(history, name, at),
    }


def _other_changes(history: History, name: str, at: Mapping[int, int]) -> dict[str, dict[str, str]]:
    """By check, in words, what was done to a module where that was not the merge alone."""
    steps = [step for step in at if (name, step) in history.corrections]
    changes = {str(at[step]): changed_words(history, name, step) for step in steps}
    return {"changes": changes} if changes else {}


def _cosine(cell: Cell | None) -> int | None:
    if cell is None:
        return None
    return {"broken": _BROKEN, "still": _STILL}.get(cell.state, thousandths(cell.cosine))


def _same(values: list[Any]) -> Any:
    """The one value, where a list holds it all through; what no check says is what the others do."""
    known = {value for value in values if value is not None}
    return next(iter(known), None) if len(known) <= 1 else values


def _reasons(row: Sequence[Cell | None], templates: dict[str, int]) -> tuple[list[int | None], dict[str, str]]:
    """The reasons of a module's checks: the template of each, and by check the numbers that are not the same in all.

    A thousand reasons differ in a number or two: one is mostly the cosine, written `{c}`, any other is written `{}`.
    """
    reasons = [(index, cell) for index, cell in enumerate(row) if cell and cell.reason]
    groups: dict[str, list[int]] = {}
    for index, cell in reasons:
        groups.setdefault(_NUMBER.sub("\0", cell.reason), []).append(index)
    numbers_of: dict[int, list[str]] = {index: _NUMBER.findall(cell.reason) for index, cell in reasons}
    cosines = {index: f"{cell.cosine:.4f}" for index, cell in reasons}
    words: list[int | None] = [None] * len(row)
    numbers: dict[str, str] = {}
    for skeleton, indices in groups.items():
        kinds = [_kind([(numbers_of[i][at], cosines[i]) for i in indices]) for at in range(skeleton.count("\0"))]
        kept = iter(kinds)
        template = re.sub("\0", lambda _, kept=kept: next(kept), skeleton)  # type: ignore[misc]
        for index in indices:
            words[index] = templates.setdefault(template, len(templates))
            rest = [text for text, kind in zip(numbers_of[index], kinds, strict=True) if kind == "{}"]
            if rest:
                numbers[str(index)] = " ".join(rest)
    return words, numbers


def _kind(texts: Sequence[tuple[str, str]]) -> str:
    if all(text == cosine for text, cosine in texts):
        return "{c}"
    first = texts[0][0]
    return first if all(text == first for text, _ in texts) else "{}"


def _measure(measured: Measured) -> Mapping[str, Any]:
    rounded = {key: _rounded(getattr(measured, key)) for key in ("value", "low", "high")}
    return {"measure": measured.measure, "kind": measured.kind, "unit": measured.unit, "text": measured.text, **rounded}


def _short(number: float) -> float | None:
    """A number of any size in four digits."""
    return float(f"{number:.4g}") if math.isfinite(number) else None


def _rounded(number: float) -> float | None:
    """A number of any size in ten digits."""
    return float(f"{number:.10g}") if math.isfinite(number) else None
