"""A history as a picture: layers downwards, checks to the right, one panel a module type, colour for the cosine."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..errors import ConfigError
from .history import History
from .layout import OUTSIDE, Panel, panels

_FORMATS = (".png", ".pdf", ".svg")
_STILL, _BROKEN, _ABSENT = (0.87, 0.87, 0.87, 1.0), (0.84, 0.12, 0.16, 1.0), (1.0, 1.0, 1.0, 0.0)
_INK, _MUTED = "#222222", "#6b6b6b"
# Inches: what the panels of one line may take together, the margins, a panel's heading, the room for names and scale.
_LINE, _LEFT, _TOP, _BOTTOM, _HEADING, _SCALE, _NAMES = 11.4, 0.62, 0.86, 0.8, 0.42, 1.15, 0.95
_PANELS_A_LINE = 8


class _Grid(NamedTuple):
    """Sizes in inches: `columns` panels a line, each `width` x `height`, `gap` apart."""

    columns: int
    lines: int
    width: float
    height: float
    gap: float
    right: float

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the figure."""
        wide = _LEFT + self.columns * (self.width + self.gap) - self.gap + self.right
        return max(wide, 7.4), _TOP + self.lines * (_HEADING + self.height + 0.4) - 0.4 + _BOTTOM

    def box(self, index: int, height: float) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel, as shares of the figure."""
        line, column = divmod(index, self.columns)
        (wide, tall), left = self.size, _LEFT + column * (self.width + self.gap)
        below = tall - _TOP - _HEADING - line * (_HEADING + self.height + 0.4) - height
        return left / wide, below / tall, self.width / wide, height / tall


def write_heat_map(history: History, output: str | Path) -> Path:
    """Draw `history` and write it as .png, .pdf or .svg; return the path. A file of that name is replaced.

    Raises ConfigError for another ending, a folder that cannot be written, or when matplotlib is not installed.
    """
    path = Path(output).expanduser()
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"report {str(output)!r}: the name must end in one of {', '.join(_FORMATS)}.")
    figure = draw_heat_map(history)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=160, facecolor="white")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"report {str(output)!r} cannot be written: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def draw_heat_map(history: History) -> Any:
    """Return a `matplotlib.figure.Figure` of every module at every check, merges marked with a ring.

    The scale runs from 0 to the highest cosine there is, or to the threshold; it is the same in all panels. Grey: has
    not moved, or nothing to compare with. Red: not finite. Panel titles give the type's median null cosine, which
    depends on the module's shape. Raises ConfigError when matplotlib is not installed.
    """
    figure = _figure_module().Figure()
    parts = panels(history.modules)
    grid = _grid(parts, len(history.steps))
    figure.set_size_inches(grid.size)
    colours = _colours(history)
    for index, panel in enumerate(parts):
        axes = figure.add_axes(grid.box(index, _height(panel, grid)))
        _draw_cells(axes, history, panel, colours)
        _draw_merges(axes, history, panel, grid)
        _label(axes, history, panel, grid)
        _label_rows(axes, panel, grid, parts[index - 1] if index % grid.columns else None)
    _title(figure, history)
    _colour_bar(figure, history, colours, grid)
    _legend(figure, history, grid)
    return figure


def _figure_module() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'safemerge-callback[report]'") from error
    return matplotlib.figure


def _grid(parts: Sequence[Panel], steps: int) -> _Grid:
    lines = -(-len(parts) // _PANELS_A_LINE)
    columns = -(-len(parts) // lines)
    inside = {panel.labels for panel in parts if panel.title != OUTSIDE}
    gap = 0.16 if len(inside) == 1 else 0.42
    right = _SCALE + (_NAMES if parts[-1].title == OUTSIDE else 0.0)
    rows = max(len(panel.modules) for panel in parts)
    width = min(max(0.2 * steps, 0.95), _LINE / columns - gap)
    return _Grid(columns, lines, width, min(max(0.15 * rows, 1.5), 5.2), gap, right)


def _height(panel: Panel, grid: _Grid) -> float:
    return min(grid.height, 0.22 * len(panel.modules)) if panel.title == OUTSIDE else grid.height


def _colours(history: History) -> Any:
    """Cosine to colour, from 0 to the highest cosine in sight, rounded up to a twentieth."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    measured = [cell.cosine for cell in history.cells.values() if cell.state == "measured"]
    marks = [history.threshold] if history.gate == "threshold" and history.threshold > 0 else []
    top = max([*measured, *marks], default=1.0) or 1.0
    return ScalarMappable(Normalize(0.0, math.ceil(round(top * 20, 6)) / 20), colormaps["viridis"])


def _draw_cells(axes: Any, history: History, panel: Panel, colours: Any) -> None:
    import numpy as np

    rows = [[history.cells.get((name, step)) for step in history.steps] for name in panel.modules]
    shades = colours.to_rgba(np.array([[cell.cosine if cell else 0.0 for cell in row] for row in rows]))
    special = {"still": _STILL, "broken": _BROKEN, "absent": _ABSENT}
    states = np.array([[cell.state if cell else "absent" for cell in row] for row in rows])
    for state, colour in special.items():
        shades[states == state] = colour
    axes.imshow(shades, aspect="auto", interpolation="nearest")


def _draw_merges(axes: Any, history: History, panel: Panel, grid: _Grid) -> None:
    """A dot in every merged cell, and thin white lines between cells that are large enough to bear them."""
    columns, rows = len(history.steps), len(panel.modules)
    cell = min(grid.width / columns, _height(panel, grid) / rows) * 72
    if cell >= 6:
        axes.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    spots = [
        (x, y)
        for y, name in enumerate(panel.modules)
        for x, s in enumerate(history.steps)
        if (name, s) in history.merges
    ]
    if spots:
        across = min(max(0.5 * cell, 1.6), 6.5)
        marks = {"s": across**2, "facecolors": "white", "edgecolors": _INK, "linewidths": min(0.9, 0.14 * across)}
        axes.scatter(*zip(*spots, strict=True), **marks, zorder=3)


def _label(axes: Any, history: History, panel: Panel, grid: _Grid) -> None:
    places = _spread(len(history.steps), max(2, int(grid.width / 0.42)))
    axes.set_xticks(places, [str(history.steps[i]) for i in places], fontsize=7.5)
    axes.tick_params(length=2.5, color=_MUTED, labelcolor=_INK)
    axes.spines[:].set_visible(False)
    keys = [(name, step) for name in panel.modules for step in history.steps]
    nulls = [history.cells[key].null_cosine for key in keys if key in history.cells]
    axes.set_title(panel.title, fontsize=9.5, color=_INK, pad=14, loc="left", parse_math=False)
    if nulls and panel.title != OUTSIDE:
        axes.annotate(
            f"null {median(nulls):.2f}", (0, 1), (0, 3), "axes fraction", "offset points", fontsize=7.5, color=_MUTED
        )


def _label_rows(axes: Any, panel: Panel, grid: _Grid, before: Panel | None) -> None:
    """Layers beside the first panel of a line and wherever they change; whole names to the right."""
    if panel.title == OUTSIDE:
        axes.yaxis.tick_right()
    places = _spread(len(panel.modules), max(2, int(_height(panel, grid) / 0.2)))
    same = before is not None and before.labels == panel.labels
    axes.set_yticks(places, [""] * len(places) if same else [panel.labels[i] for i in places], fontsize=7.5)
    if before is None and panel.title != OUTSIDE:
        axes.set_ylabel("layer", fontsize=8.5, color=_MUTED)


def _spread(count: int, at_most: int) -> list[int]:
    """Evenly spaced positions from 0, at round distances."""
    distances = (d for d in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, 200, 500, 1000, count) if count / d <= at_most)
    return list(range(0, count, next(distances)))


def _title(figure: Any, history: History) -> None:
    wide, tall = figure.get_size_inches()
    checks, merged = len(history.steps), len(history.merged_modules)
    facts = f"{len(history.modules)} modules, {checks} check{'' if checks == 1 else 's'}, {history.rule}"
    text = {"x": _LEFT / wide, "ha": "left", "va": "top", "parse_math": False}
    head = f"{history.title}: cosine of each module's update to the safety subspace"
    figure.text(y=1 - 0.2 / tall, s=head, fontsize=12.5, color=_INK, fontweight="bold", **text)
    what = f"{len(history.merges)} merges in {merged} modules" if merged else "nothing merged"
    figure.text(y=1 - 0.48 / tall, s=f"{facts}; {what}", fontsize=9, color=_MUTED, **text)


def _colour_bar(figure: Any, history: History, colours: Any, grid: _Grid) -> None:
    (wide, tall), height = grid.size, min(grid.height, 3.4)
    left = _LEFT + grid.columns * (grid.width + grid.gap) - grid.gap + grid.right - _SCALE + 0.28
    box = (left / wide, 1 - (_TOP + _HEADING + height) / tall, 0.14 / wide, height / tall)
    bar = figure.colorbar(colours, cax=figure.add_axes(box))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2.5, color=_MUTED, labelcolor=_INK)
    bar.ax.set_title("cosine", fontsize=8.5, color=_MUTED, loc="left", pad=6)
    if history.gate == "threshold":
        bar.ax.axhline(history.threshold, color="white", linewidth=2.4)
        bar.ax.axhline(history.threshold, color=_BROKEN, linewidth=1.2)
        bar.ax.annotate(
            f"{history.threshold:g}",
            (0, history.threshold),
            (-3, 0),
            ("axes fraction", "data"),
            "offset points",
            fontsize=7.5,
            color=_BROKEN,
            ha="right",
            va="center",
        )


def _legend(figure: Any, history: History, grid: _Grid) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    states = {cell.state for cell in history.cells.values()}
    dot = Line2D([], [], linestyle="", marker="o", markersize=5, markerfacecolor="white", markeredgecolor=_INK)
    keys: dict[str, Any] = {"merged": dot} if history.merges else {}
    if "still" in states:
        keys["has not moved, or nothing to compare with"] = Patch(color=_STILL)
    if "broken" in states:
        keys["not finite"] = Patch(color=_BROKEN)
    wide, tall = grid.size
    figure.text(_LEFT / wide, 0.36 / tall, "step of the check", fontsize=8.5, color=_MUTED, ha="left")
    if keys:
        figure.legend(
            list(keys.values()),
            list(keys),
            loc="lower left",
            bbox_to_anchor=((_LEFT + 1.4) / wide, 0.22 / tall),
            ncols=len(keys),
            frameon=False,
            fontsize=8.5,
            borderaxespad=0.0,
            handletextpad=0.5,
        )
