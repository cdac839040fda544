"""The figures of a gradient term that the page's template sets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ...record.history import History
from ..terms import LOSS, ROWS, Course, loss_words, share_words
from ..words import NOTHING, seconds_text, several

# Rows of a table that nobody reads to its end.
MOST_READINGS = 200


def term_tiles(history: History, course: Course) -> Iterator[tuple[str, str, str]]:
    """Return label, value and note of three tiles: the last loss, how often the term came, and what that took."""
    losses = course.losses
    kinds = [f"{name} {loss_words(of_kind)}" for name, of_kind in losses.items() if name != LOSS]
    began = f"at first {course.first.loss:.3g}" if math.isfinite(course.first.loss) else "at first not known"
    label = f"loss of {course.name} at step {course.last_step}"
    yield label, loss_words({0: course.last.loss}), ", ".join([began, *kinds])
    rows = () if course.rows is None else (several(course.rows, "row"),)
    yield f"steps with {course.name}", str(course.steps), ", ".join((*rows, course.settings))
    share = share_words(history, course.seconds).removeprefix(", ")
    yield f"passes of {course.name}", seconds_text(course.seconds), share or "on the first process"


def term_table(course: Course) -> dict[str, Any]:
    """Return a gradient term's readings as a table, at most `MOST_READINGS` of them, the last among these."""
    kinds = [name for name in course.losses if name != LOSS]
    heads = ["until step", "steps", "rows", LOSS, *kinds, "norm", "cosine", "seconds"]
    steps = list(course.readings)
    every = -(-len(steps) // MOST_READINGS)
    kept = steps[::-1][::every][::-1]
    return {
        "name": course.name,
        "every": every,
        "heads": heads,
        "rows": [_reading(course, step, kinds) for step in kept],
    }


def _reading(course: Course, step: int, kinds: Sequence[str]) -> list[str]:
    reading = course.readings[step]
    losses = [reading.loss, *(course.losses[kind][step] for kind in kinds)]
    numbers = [reading.figures.get(ROWS, math.nan), *losses, reading.norm, reading.cosine, reading.seconds]
    shown = [f"{number:.4g}" if math.isfinite(number) else NOTHING for number in numbers]
    return [str(step), str(reading.steps), *shown]
