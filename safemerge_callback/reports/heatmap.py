"""A history as a picture: layers downwards, checks to the right, one panel a module type, colour for the cosine."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from ..record.history import History
from .layout import LEFT, OUTSIDE, Panel, PanelGrid, grid_for, panels
from .saving import checked_name, figure_module, save_figure
from .words import correction_words, counted, mark_words

_STILL, _BROKEN, _ABSENT = (0.87, 0.87, 0.87, 1.0), (0.84, 0.12, 0.16, 1.0), (1.0, 1.0, 1.0, 0.0)
_INK, _MUTED, _BACK = "#222222", "#6b6b6b", "#ffb000"


def write_heat_map(history: History, output: str | Path) -> Path:
    """Draw `history` and write it as .png, .pdf or .svg; return the path. A file of that name is replaced.

    Raises ConfigError for another ending, a folder that cannot be written, or when matplotlib is not installed.
    """
    path = checked_name(output)
    return save_figure(draw_heat_map(history), path)


def draw_heat_map(history: History) -> Any:
    """Return a `matplotlib.figure.Figure` of every module at every check, merges marked with a ring.

    The scale runs from 0 to the highest cosine there is, or to the one that the gate merges below; it is the same in
    all panels. Grey: has not moved, or nothing to compare with. Red: not finite. Panel titles give the type's median
    null cosine, which depends on the module's shape. Raises ConfigError when matplotlib is not installed.
    """
    figure = figure_module().Figure()
    parts = panels(history.modules)
    grid = grid_for(parts, len(history.steps))
    figure.set_size_inches(grid.size)
    colours = _colours(history)
    for index, panel in enumerate(parts):
        axes = figure.add_axes(grid.box(index, grid.panel_height(panel)))
        _draw_cells(axes, history, panel, colours)
        _draw_merges(axes, history, panel, grid)
        _label(axes, history, panel, grid)
        _label_rows(axes, panel, grid, parts[index - 1] if index % grid.columns else None)
    _title(figure, history)
    _colour_bar(figure, history, colours, grid)
    _legend(figure, history, grid)
    return figure


def _colours(history: History) -> Any:
    """Cosine to colour, from 0 to the highest cosine in sight, rounded up to a twentieth."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    measured = [cell.cosine for cell in history.cells.values() if cell.state == "measured"]
    marks = [history.limit] if history.limit > 0 else []
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


def _draw_merges(axes: Any, history: History, panel: Panel, grid: PanelGrid) -> None:
    """A dot in every merged cell, orange where that was taken back; thin lines between cells that can bear them."""
    columns, rows = len(history.steps), len(panel.modules)
    cell = min(grid.width / columns, grid.panel_height(panel) / rows) * 72
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
        across = min(max(0.5 * cell, min(1.25 * cell, 3.6), 2.0), 6.5)
        back = [(panel.modules[y], history.steps[x]) in history.undone for x, y in spots]
        faces = [_BACK if undone else "white" for undone in back]
        marks = {"s": across**2, "facecolors": faces, "edgecolors": _INK, "linewidths": min(0.9, 0.14 * across)}
        axes.scatter(*zip(*spots, strict=True), **marks, zorder=3)


def _label(axes: Any, history: History, panel: Panel, grid: PanelGrid) -> None:
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


def _label_rows(axes: Any, panel: Panel, grid: PanelGrid, before: Panel | None) -> None:
    """Layers beside the first panel of a line and wherever they change; whole names to the right."""
    if panel.title == OUTSIDE:
        axes.yaxis.tick_right()
    places = _spread(len(panel.modules), max(2, int(grid.panel_height(panel) / 0.2)))
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
    facts = f"{counted(history.modules, 'module')}, {counted(history.checks, 'check')}, {history.rule}"
    merged, *others = correction_words(history).values()
    done = "; ".join([facts, merged if history.merged_modules else "nothing merged", *others])
    text = {"x": LEFT / wide, "ha": "left", "va": "top", "parse_math": False}
    figure.text(y=1 - 0.2 / tall, s=history.title, fontsize=12.5, color=_INK, fontweight="bold", **text)
    about = "cosine of each module's update to the safety subspace"
    figure.text(y=1 - 0.48 / tall, s=about, fontsize=9, color=_INK, **text)
    figure.text(
        y=1 - 0.68 / tall,
        s=done,
        fontsize=9,
        color=_MUTED,
        **text,
    )


def _colour_bar(figure: Any, history: History, colours: Any, grid: PanelGrid) -> None:
    bar = figure.colorbar(colours, cax=figure.add_axes(grid.scale_box))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2.5, color=_MUTED, labelcolor=_INK)
    bar.ax.set_title("cosine", fontsize=8.5, color=_MUTED, loc="left", pad=6)
    if not math.isnan(history.limit):
        bar.ax.axhline(history.limit, color="white", linewidth=2.4)
        bar.ax.axhline(history.limit, color=_BROKEN, linewidth=1.2)
        bar.ax.annotate(
            f"{history.limit:g}",
            (0, history.limit),
            (-3, 0),
            ("axes fraction", "data"),
            "offset points",
            fontsize=7.5,
            color=_BROKEN,
            ha="right",
            va="center",
        )


def _legend(figure: Any, history: History, grid: PanelGrid) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    states = {cell.state for cell in history.cells.values()}
    dot = Line2D([], [], linestyle="", marker="o", markersize=5, markerfacecolor="white", markeredgecolor=_INK)
    keys: dict[str, Any] = {mark_words(history): dot} if history.merges else {}
    if history.undone:
        look: dict[str, Any] = {
            "linestyle": "",
            "marker": "o",
            "markersize": 5,
            "markerfacecolor": _BACK,
            "markeredgecolor": _INK,
        }
        keys["taken back"] = Line2D([], [], **look)
    if not math.isnan(history.limit):
        keys["threshold"] = Line2D([], [], color=_BROKEN, linewidth=1.2)
    if "still" in states:
        keys["nothing to measure"] = Patch(color=_STILL)
    if "broken" in states:
        keys["not finite"] = Patch(color=_BROKEN)
    wide, tall = grid.size
    figure.text(LEFT / wide, 0.3 / tall, "step of the check", fontsize=8.5, color=_MUTED, ha="left", va="center")
    if keys:
        figure.legend(
            list(keys.values()),
            list(keys),
            loc="center left",
            bbox_to_anchor=((LEFT + 1.3) / wide, 0.3 / tall),
            ncols=len(keys),
            frameon=False,
            handlelength=1.4,
            columnspacing=1.6,
            fontsize=8.5,
            borderaxespad=0.0,
            handletextpad=0.5,
        )
