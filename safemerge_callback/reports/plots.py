"""What the page shows, as pictures for a paper or a slide: one plot a file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..decision import BAND
from ..errors import ConfigError
from ..evaluation.units import SHARE
from ..io.choices import one_of
from ..io.paths import as_path
from ..record import JOURNAL_FILE, PAGE_FILE
from ..record.history import LOSS, History, Measured
from .heatmap import draw_heat_map
from .page import write_page
from .saving import FORMATS, figure_module, save_figure
from .terms import courses
from .words import mark_words

# Told apart by those who see few colours (Okabe and Ito), and by their dashes.
_LOOKS = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"), ("#8e3a80", "-."), ("#7a6000", (0, (6, 1))))
_GATE, _MUTED, _BAND = "#b3261e", "#6b6b6b", "#d5dae0"


def write_report(history: History, output: str | Path, plot: str | None = None) -> Path:
    """Write the page, or a plot, as the ending of `output` says; for a run's folder or its journal, the page beside it.

    `plot`: heatmap, moved, trajectories, weights, losses or probe; by default what there is of heatmap, losses, weights
    and probe, the first of them. Raises ConfigError for another ending, plot or nothing to plot, for `plot` with a
    page, where the file cannot be written, or where matplotlib is missing.
    """
    path = _beside(as_path(output, "report"))
    if path.suffix.lower() not in (".html", ".htm", *FORMATS):
        raise ConfigError(f"report {str(output)!r}: the name must end in one of .html, {', '.join(FORMATS)}.")
    if path.suffix.lower() in FORMATS:
        return save_figure(draw_plot(history, plot or _there(history)[0]), path)
    if plot is not None:
        raise ConfigError(f"plot={plot!r} with {path.name!r}: a page holds them all; drop it, or ask for a .png.")
    return write_page(history, path)


def _beside(path: Path) -> Path:
    if path.is_dir():
        return path / PAGE_FILE
    return path.with_name(PAGE_FILE) if path.name == JOURNAL_FILE or path.suffix == ".jsonl" else path


def draw_plot(history: History, plot: str) -> Any:
    """Return a plot as `matplotlib.figure.Figure`: heatmap, moved, trajectories, weights, losses or probe.

    Raises ConfigError for another name, where the run has nothing of that kind, or when matplotlib is not installed.
    """
    one_of(plot, PLOTS, "plot")
    if plot in ("heatmap", "moved", "trajectories") and not history.cells:
        raise ConfigError(f"plot={plot!r}: nothing was checked in this run; choose {' or '.join(_there(history))}.")
    return PLOTS[plot](history)


def _there(history: History) -> list[str]:
    """The plots of what a run has, the one that says most first; probe where it has nothing."""
    parts = {"heatmap": history.cells, "losses": history.terms, "weights": history.merges, "probe": history.probes}
    return [plot for plot, part in parts.items() if part] or ["probe"]


def draw_trajectories(history: History, count: int = 5) -> Any:
    """Return the cosines of the `count` modules that end lowest over steps, their null cosines dotted, merges ringed.

    Grey are all modules, from the lowest to the highest, with their median; red is what the gate merges below, where
    that is one cosine for all.
    """
    figure, axes = _axes(history, "cosine to the safety subspace")
    values = {
        step: sorted(
            cells[step].cosine
            for cells in history.by_module.values()
            if step in cells and cells[step].state == "measured"
        )
        for step in history.steps
    }
    _band(axes, values)
    for index, name in enumerate(_lowest(history, count)):
        colour, dash = _LOOKS[index % len(_LOOKS)]
        cells = history.by_module[name]
        known = {step: cell.cosine if cell.state == "measured" else math.nan for step, cell in cells.items()}
        axes.plot(list(known), list(known.values()), color=colour, linestyle=dash, linewidth=1.6, label=name)
        nulls = [cell.null_cosine for cell in cells.values()]
        axes.plot(list(cells), nulls, color=colour, linestyle=(0, (1, 3)), linewidth=1.0)
        merged = [step for step in history.task_weights.get(name, {}) if step in known]
        ring = {"linestyle": "", "marker": "o", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": colour}
        axes.plot(merged, [known[step] for step in merged], **ring)
    if not math.isnan(history.limit):
        label = f"threshold {history.limit:g}"
        axes.axhline(history.limit, color=_GATE, linewidth=1.2, linestyle=(0, (5, 3)), label=label)
    axes.set_ylim(bottom=0)
    _finish(axes)
    return figure


def draw_weights(history: History, count: int = 5) -> Any:
    """Return the share of the task's update that merges left over steps: all modules as a band, the lowest as lines."""
    if not history.merges:
        raise ConfigError("plot='weights': nothing was merged in this run; choose trajectories or heatmap.")
    figure, axes = _axes(history, "share of the task's update left")
    shares = {name: _after(history, name) for name in history.modules}
    _band(axes, {step: sorted(shares[name][i] for name in shares) for i, step in enumerate(history.steps)}, stairs=True)
    lowest = sorted(shares, key=lambda name: shares[name][-1])[:count]
    for index, name in enumerate(lowest):
        colour, dash = _LOOKS[index % len(_LOOKS)]
        look = {"color": colour, "linestyle": dash, "linewidth": 1.6}
        axes.step(history.steps, shares[name], where="post", label=name, **look)
    axes.set_ylim(bottom=0)
    _finish(axes)
    return figure


def draw_moved(history: History) -> Any:
    """Return how far the updates go along V over steps, the mean over the modules, and the edge of `BAND` in red."""
    if not history.moved:
        raise ConfigError(
            "plot='moved': this journal does not say how far the updates go along V (a compressed subspace, or an "
            "older release); choose heatmap or trajectories."
        )
    figure, axes = _axes(history, "moved along V, mean over the modules")
    steps, means = list(history.moved), list(history.moved.values())
    axes.axhline(0.0, color=_MUTED, linewidth=0.8)
    axes.plot(steps, means, color=_LOOKS[0][0], linewidth=1.6, marker="o", markersize=3, label="mean of all modules")
    axes.axhline(BAND.edge, color=_GATE, linewidth=1.2, linestyle=(0, (5, 3)), label=f"edge {BAND.edge:g}")
    _finish(axes)
    return figure


def draw_losses(history: History) -> Any:
    """Return each gradient term's mean loss over steps, by kind of rows where it says them, in one plot each.

    Below, where they are known, the norms of the terms' gradients and their cosines to the task's. A vertical line
    stands where modules were merged, or changed otherwise.
    """
    terms = courses(history)
    if not terms:
        raise ConfigError(f"plot='losses': no gradient term was in this run; choose {' or '.join(_there(history))}.")
    norms = {course.name: course.norms for course in terms if course.norms}
    cosines = {course.name: course.cosines for course in terms if course.cosines}
    gradients = {"norm of the gradient": norms, "cosine to the task's": cosines}
    parts = [(f"{course.name}: loss", course.losses) for course in terms]
    parts += [(about, lines) for about, lines in gradients.items() if lines]
    changed = {step for _, step in history.merges}
    figure = figure_module().Figure(figsize=(8.0, 1.2 + 2.4 * len(parts)), layout="constrained")
    for index, (about, lines) in enumerate(parts):
        axes = figure.add_subplot(len(parts), 1, index + 1, sharex=figure.axes[0] if index else None)
        _dress(axes, about)
        _draw_lines(axes, lines)
        for step in sorted(changed):
            label = f"modules {mark_words(history)}" if step == min(changed) else None
            axes.axvline(step, color=_MUTED, linewidth=0.8, linestyle=":", label=label)
        _finish(axes)
    _title(figure.axes[0], history)
    return figure


def _draw_lines(axes: Any, lines: Mapping[str, Mapping[int, float]]) -> None:
    mark = {"marker": "o", "markersize": 3} if max(map(len, lines.values())) < 40 else {}
    for index, (name, values) in enumerate(lines.items()):
        colour, dash = _LOOKS[index % len(_LOOKS)]
        known = {step: value for step, value in values.items() if math.isfinite(value)}
        axes.plot(list(known), list(known.values()), color=colour, linestyle=dash, linewidth=1.6, label=name, **mark)
    axes.axhline(0.0, color=_MUTED, linewidth=0.8)


def draw_probe(history: History) -> Any:
    """Return harm, over-refusal and task of every probe over steps, with their 95 % intervals, in one plot.

    Shares have one axis, any other measure has an axis of its own below, in its unit.
    """
    measures = {m.measure: m for probe in history.probes for m in probe.measures}
    shares = [name for name, m in measures.items() if m.unit == SHARE]
    others = [name for name in measures if name not in shares and name != LOSS]
    if not shares and not others:
        raise ConfigError("plot='probe': no probe was made in this run; choose trajectories, weights or heatmap.")
    parts = [shares, *([name] for name in others)] if shares else [[name] for name in others]
    figure = figure_module().Figure(figsize=(8.0, 2.2 + 2.4 * len(parts)), layout="constrained")
    for index, names in enumerate(parts):
        axes = figure.add_subplot(len(parts), 1, index + 1, sharex=figure.axes[0] if index else None)
        _dress(axes, "share of the prompts" if names is shares else measures[names[0]].unit or "score")
        for name in names:
            _draw_measure(axes, history, measures[name], list(measures).index(name))
        if names is shares:
            axes.set_ylim(0, 1)
        _finish(axes)
    _title(figure.axes[0], history)
    return figure


def _draw_measure(axes: Any, history: History, about: Measured, index: int) -> None:
    colour, dash = _LOOKS[index % len(_LOOKS)]
    probes = [(p.step, m) for p in history.probes for m in p.measures if m.measure == about.measure]
    known = [(step, m) for step, m in probes if not math.isnan(m.value)]
    steps, values = [step for step, _ in known], [m.value for _, m in known]
    axes.plot(steps, values, color=colour, linestyle=dash, label=f"{about.measure} ({about.kind})".replace("_", " "))
    bars = [[max(0.0, m.value - m.low) for _, m in known], [max(0.0, m.high - m.value) for _, m in known]]
    axes.errorbar(steps, values, bars, fmt="o", markersize=3, capsize=2, linewidth=0.9, color=colour)


def _axes(history: History, about: str) -> tuple[Any, Any]:
    figure = figure_module().Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, about)
    _title(axes, history)
    return figure, axes


def _dress(axes: Any, about: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e9edf0", linewidth=0.8)
    axes.set_xlabel("step", color=_MUTED)
    axes.set_ylabel(about, color=_MUTED, parse_math=False)


def _title(axes: Any, history: History) -> None:
    about = history.rule or ", ".join(history.terms)
    axes.set_title(": ".join(filter(None, (history.title, about))), loc="left", fontsize=10.5, parse_math=False)


def _finish(axes: Any) -> None:
    legend = axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _band(axes: Any, values: dict[int, list[float]], stairs: bool = False) -> None:
    known = {step: row for step, row in values.items() if row}
    lows, highs = [row[0] for row in known.values()], [row[-1] for row in known.values()]
    look = {"color": _BAND, "alpha": 0.6, "linewidth": 0, "label": "all modules"}
    axes.fill_between(list(known), lows, highs, step="post" if stairs else None, **look)
    middle = [statistics.median(row) for row in known.values()]
    axes.plot(list(known), middle, color=_MUTED, linewidth=1, drawstyle="steps-post" if stairs else "default")


def _lowest(history: History, count: int) -> list[str]:
    last = {name: cells[max(cells)] for name, cells in history.by_module.items() if cells}
    known = [name for name, cell in last.items() if cell.state == "measured"]
    return sorted(known, key=lambda name: last[name].cosine)[:count]


def _after(history: History, name: str) -> Sequence[float]:
    """What is left of a module's own update after each check."""
    left, now = history.task_weights.get(name, {}), 1.0
    shares = []
    for step in history.steps:
        now = left.get(step, now)
        shares.append(now)
    return shares


PLOTS: dict[str, Callable[[History], Any]] = {
    "heatmap": draw_heat_map,
    "moved": draw_moved,
    "trajectories": draw_trajectories,
    "weights": draw_weights,
    "losses": draw_losses,
    "probe": draw_probe,
}
