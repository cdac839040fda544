"""Which module goes where in a picture: one panel a module type, one row a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "outside the layers"
# Inches: what the panels of one line may take together, the margins, a panel's heading, the room for names and scale.
_LINE, LEFT, _TOP, _BOTTOM, _HEADING, _SCALE, _NAMES = 11.4, 0.62, 0.95, 0.8, 0.42, 1.4, 0.95
# What the words above the panels need; few panels of few steps grow to fill it.
_LEAST = 6.0
_PANELS_A_LINE = 8


class Panel(NamedTuple):
    """One module type: its modules, and the label of each one's row (its layer, and its expert where it has one)."""

    title: str
    modules: tuple[str, ...]
    labels: tuple[str, ...]


class PanelGrid(NamedTuple):
    """Where panels lie, in inches: `columns` of them a line, each `width` x `height`, `gap` apart."""

    columns: int
    lines: int
    width: float
    height: float
    gap: float
    right: float

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the figure."""
        wide = LEFT + self.columns * (self.width + self.gap) - self.gap + self.right
        return max(wide, _LEAST), _TOP + self.lines * (_HEADING + self.height + 0.4) - 0.4 + _BOTTOM

    @property
    def scale_box(self) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of the colour scale, as shares of the figure."""
        (wide, tall), height = self.size, min(self.height, 3.4)
        left = LEFT + self.columns * (self.width + self.gap) - self.gap + self.right - _SCALE + 0.5
        return left / wide, 1 - (_TOP + _HEADING + height) / tall, 0.14 / wide, height / tall

    def panel_height(self, panel: Panel) -> float:
        """A panel's height in inches: whole, except for the few modules outside the layers."""
        return min(self.height, 0.22 * len(panel.modules)) if panel.title == OUTSIDE else self.height

    def box(self, index: int, height: float) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel, as shares of the figure."""
        line, column = divmod(index, self.columns)
        (wide, tall), left = self.size, LEFT + column * (self.width + self.gap)
        below = tall - _TOP - _HEADING - line * (_HEADING + self.height + 0.4) - height
        return left / wide, below / tall, self.width / wide, height / tall


def grid_for(parts: Sequence[Panel], steps: int) -> PanelGrid:
    """Return where the panels go; cells grow and shrink so that the figure stays about as wide as a screen."""
    lines = -(-len(parts) // _PANELS_A_LINE)
    columns = -(-len(parts) // lines)
    inside = {panel.labels for panel in parts if panel.title != OUTSIDE}
    gap = 0.16 if len(inside) == 1 else 0.42
    right = _SCALE + (_NAMES if parts[-1].title == OUTSIDE else 0.0)
    rows = max(len(panel.modules) for panel in parts)
    spare = (_LEAST - LEFT - right + gap) / columns - gap
    width = min(max(0.2 * steps, 0.95, min(spare, 0.4 * steps)), _LINE / columns - gap)
    return PanelGrid(columns, lines, width, min(max(0.15 * rows, 1.5), 5.2), gap, right)


def panels(modules: Iterable[str]) -> list[Panel]:
    """Return the panels in the order in which their types first appear; each one's rows ascend by layer.

    `layers.3.self_attn.q_proj` is layer 3 of type `q_proj`; a type's name is as long as it must be to tell it from the
    others. Modules without a number (embeddings, output head) share the last panel.
    """
    types: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    outside: list[str] = []
    for name in modules:
        kind, numbers = _split(name)
        if numbers:
            types.setdefault(kind, []).append((numbers, name))
        else:
            outside.append(name)
    titles = _short(list(types))
    inside = [_panel(titles[kind], sorted(rows)) for kind, rows in types.items()]
    return [*inside, Panel(OUTSIDE, tuple(outside), tuple(outside))] if outside else inside


def _panel(title: str, rows: Sequence[tuple[tuple[int, ...], str]]) -> Panel:
    labels = tuple(".".join(map(str, numbers)) for numbers, _ in rows)
    return Panel(title, tuple(name for _, name in rows), labels)


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """The name without its numbers, and the numbers."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    return ".".join(part for part in parts if not part.isdecimal()), numbers


def _short(types: Sequence[str]) -> dict[str, str]:
    """The last part of each type, or more of them where several types end alike."""
    return {kind: _shortest_ending(kind.split("."), [t.split(".") for t in types if t != kind]) for kind in types}


def _shortest_ending(parts: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    lengths = range(1, len(parts) + 1)
    enough = next((n for n in lengths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
    return ".".join(parts[-enough:])
