"""The heat map as a picture, for trackers that draw nothing themselves."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from .columns import ColumnCell, Drift

if TYPE_CHECKING:
    from PIL.Image import Image

_ROOM, _GAP, _HEAD, _FOOT, _SCALE = 34, 14, 46, 22, 96
_INK, _MUTED, _PAPER, _EMPTY, _LINE = "#222222", "#6b6b6b", "#ffffff", "#dddddd", "#d62728"
# Ten points of the viridis map: Stéfan van der Walt and Nathaniel Smith, 2015, CC0.
_VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"]


def heat_map(drift: Drift) -> Image:
    """Return an RGB picture: a panel a module type, a row a layer, a column one or more checks; a dot marks a merge.

    Colour: the cosine from 0 to the highest in sight. The red line on the scale is the cosine that the gate merges
    below, its median over the modules where each has its own; grey is no number. Needs Pillow.
    """
    from PIL import Image, ImageDraw

    panels = _panels(drift)
    steps = len(drift.columns)
    most = max((len(rows) for rows in panels.values()), default=1)
    cell = _clamped(1200 // max(steps * len(panels), 1)), _clamped(360 // most)
    wide = [max(steps * cell[0], 6 * len(name) + 6) for name in panels]
    tall = cell[1] * most
    size = (_ROOM + sum(wide) + _GAP * len(panels) + _SCALE, max(tall, 120) + _HEAD + _FOOT)
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    top = _top(drift.cells)
    draw.text((_ROOM, 8), "cosine to the safety subspace, by layer and check; a dot marks a merge", fill=_INK)
    left = _ROOM
    for (name, rows), width in zip(panels.items(), wide, strict=True):
        draw.text((left, _HEAD - 16), name, fill=_INK)
        for row, (layer, modules) in enumerate(rows.items()):
            if left == _ROOM and row % -(-12 // cell[1]) == 0:
                draw.text((6, _HEAD + row * cell[1] - 3), layer if layer.isdecimal() else "", fill=_MUTED)
            _draw_row(draw, drift, modules, (left, _HEAD + row * cell[1]), cell, top)
        _draw_steps(draw, drift, left, _HEAD + len(rows) * cell[1] + 4, cell[0])
        left += width + _GAP
    _draw_scale(draw, drift, left + 4, top, max(tall, 120))
    return picture


def _panels(drift: Drift) -> dict[str, dict[str, list[str]]]:
    """Type -> layer -> modules, in the order in which types appear; a module outside the layers is its own row."""
    newest: dict[str, ColumnCell] = {name: cell for column in drift.columns for name, cell in column.items()}
    titles = _titles({cell.type for cell in newest.values() if cell.layer is not None})
    panels: dict[str, dict[str, list[str]]] = {}
    for name, cell in sorted(newest.items(), key=lambda item: -1 if item[1].layer is None else item[1].layer):
        title, row = ("other", name) if cell.layer is None else (titles[cell.type], str(cell.layer))
        panels.setdefault(title, {}).setdefault(row, []).append(name)
    return panels


def _titles(types: set[str]) -> dict[str, str]:
    """The last part of each type, or all of it where two end alike."""
    ends = Counter(kind.rpartition(".")[2] for kind in types)
    return {kind: end if ends[end] == 1 else kind for kind in types for end in [kind.rpartition(".")[2]]}


def _draw_row(
    draw: Any, drift: Drift, modules: list[str], place: tuple[int, int], cell: tuple[int, int], top: float
) -> None:
    """One layer's cells: of several modules in one (experts), the lowest cosine; merged if any of them was."""
    (left, above), (wide, tall) = place, cell
    for at, column in enumerate(drift.columns):
        cells = [column[name] for name in modules if name in column]
        if not cells:
            continue
        cosines = [c.cosine for c in cells if c.cosine is not None]
        x = left + at * wide
        colour = _colour(min(cosines) / top) if cosines else _EMPTY
        draw.rectangle((x, above, x + wide - 2, above + tall - 2), fill=colour)
        if any(c.merged for c in cells):
            across, down, radius = x + wide / 2 - 1, above + tall / 2 - 1, max(1.0, min(wide, tall) / 6)
            draw.ellipse((across - radius, down - radius, across + radius, down + radius), fill=_PAPER, outline=_INK)


def _draw_steps(draw: Any, drift: Drift, left: int, below: int, cell: int) -> None:
    """The first and, where there is room, the last step."""
    steps = [next(iter(column.values())).step for column in drift.columns]
    draw.text((left, below), str(steps[0]), fill=_MUTED)
    if len(steps) * cell > 60:
        draw.text((left + len(steps) * cell - 6 * len(str(steps[-1])), below), str(steps[-1]), fill=_MUTED)


def _draw_scale(draw: Any, drift: Drift, left: int, top: float, tall: int) -> None:
    for y in range(tall):
        draw.line((left, _HEAD + y, left + 14, _HEAD + y), fill=_colour(1 - y / tall))
    draw.text((left + 18, _HEAD - 5), f"{top:.2f}", fill=_MUTED)
    draw.text((left + 18, _HEAD + tall - 8), "0", fill=_MUTED)
    limits = sorted(c.limit for c in drift.columns[-1].values() if c.limit is not None)
    if limits:
        limit = limits[len(limits) // 2]
        at = _HEAD + tall * (1 - min(max(limit / top, 0.0), 1.0))
        draw.line((left - 3, at, left + 17, at), fill=_LINE, width=2)
        draw.text((left + 20, at - 6), f"{limit:.2f}", fill=_LINE)


def _top(cells: list[ColumnCell]) -> float:
    """The highest cosine or limit in sight, the top of the scale; 1.0 where there is none."""
    return max([v for cell in cells for v in (cell.cosine, cell.limit) if v is not None], default=1.0) or 1.0


def _clamped(size: int) -> int:
    """A cell's width or height in pixels."""
    return max(4, min(16, size))


def _colour(share: float) -> tuple[int, int, int]:
    """`share` in [0, 1] as a colour between the nearest two points."""
    at = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(at), len(_VIRIDIS) - 2)
    one, two = (bytes.fromhex(_VIRIDIS[i]) for i in (low, low + 1))
    red, green, blue = (round(a + (at - low) * (b - a)) for a, b in zip(one, two, strict=True))
    return red, green, blue
