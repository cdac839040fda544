"""The grid's questions, answered place by place: does the reference beat a front, and one arm another?"""

from __future__ import annotations

from collections.abc import Sequence

from .figures import HARM, Place, matched
from .grid import Grid
from .markdown import points, table
from .statistics import AtScore

_MEASURES = {HARM: "harm refused", "benign_refused": "harmless refused", "task": "task"}


def answers(grid: Grid, places: Sequence[Place]) -> str:
    """Return the section that comes first: a column a place, in points with 95 % intervals; nothing for no results."""
    parts = [part for part in (_against_fronts(grid, places), _contrasts(grid, places)) if part]
    return "\n\n".join(["## In short", *parts]) if parts else ""


def _against_fronts(grid: Grid, places: Sequence[Place]) -> str:
    """The reference's refusal less that of each family's front at the reference's own task score."""
    found = [matched(grid, place) for place in places]
    families = dict.fromkeys(family for one in found for family in one)
    rows = [[family, *(_cell(one.get(family)) for one in found)] for family in families]
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return ""
    said = (
        f"Harm that {grid.reference} refuses above the front of each other arm (with {grid.baseline} on it), at "
        f"{grid.reference}'s own task score; empty where that front holds no such score:"
    )
    return f"{said}\n\n{table(['front of', *(place.title for place in places)], rows)}"


def _cell(found: AtScore | None) -> str:
    return f"{points(found.above)}, {_seeds(len(found.seeds))}" if found and found.above else ""


def _contrasts(grid: Grid, places: Sequence[Place]) -> str:
    """One arm less another, paired by seed and prompt."""
    rows = []
    for arm, other in grid.contrasts:
        for measure, title in _MEASURES.items():
            shown = [points(place.difference(arm, other, measure)) for place in places]
            rows += [[f"{arm} less {other}", title, *shown]] if any(shown) else []
    if not rows:
        return ""
    heads = ["arms", "measure", *(place.title for place in places)]
    return f"One arm less another, paired by seed and prompt:\n\n{table(heads, rows)}"


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number > 1)}"
