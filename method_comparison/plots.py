"""The page's plots, as SVG files that are equal, byte for byte, for equal results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_callback.errors import ConfigError

from .drift_measures import AdapterDrift
from .figures import HARM, Place, families, fronts
from .grid import Grid
from .statistics import front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "osD^v<>PX*hp"
# The SVG's ids and date would otherwise change with every run.
_PARAMETERS = {"svg.hashsalt": "safemerge", "font.size": 8}
_COLORS = "tab20"
_METADATA = {"Date": None, "Creator": None}


def write_plots(grid: Grid, places: Sequence[Place], folder: Path) -> dict[str, Path]:
    """Write front.svg, steps.svg and modules.svg; return title -> file of those that had something to show.

    ConfigError where matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Path] = {}
    plots = {
        "Refusal against task score": ("front.svg", _fronts),
        "Over the steps of training": ("steps.svg", _steps),
        "Modules merged": ("modules.svg", _modules),
    }
    with _style():
        for title, (name, draw) in plots.items():
            figure = draw(grid, places)
            if figure is not None:
                figure.savefig(folder / name, format="svg", metadata=_METADATA, bbox_inches="tight")
                drawn[title] = folder / name
    return drawn


def _style() -> AbstractContextManager[None]:
    try:
        import matplotlib as mpl
        from matplotlib.rcsetup import cycler
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'safemerge-callback[report]'") from None
    return mpl.rc_context({**_PARAMETERS, "axes.prop_cycle": cycler(color=mpl.color_sequences[_COLORS])})


def _panels(number: int, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(number, 2)
    rows = -(-number // columns)
    figure = Figure(figsize=(5.2 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[number:]:
        spare.remove()
    return figure, axes[:number]


def _fronts(grid: Grid, places: Sequence[Place]) -> Figure | None:
    """Every arm's mean with its intervals, and a line along each family's front; a level for a model as it is.

    Such a model has learnt no task: as a point it would squeeze all others into a corner.
    """
    if not places:
        return None
    figure, axes = _panels(len(places))
    looks = _looks(grid, places)
    for axis, place in zip(axes, places, strict=True):
        lines = fronts(grid, place)
        for family, names in families(grid, place).items():
            mark, color = looks[family]
            for name in names:
                task, harm = place.interval(name, "task"), place.interval(name, HARM)
                if task is None or harm is None:
                    continue
                if grid.arms[name].kind == "model":
                    axis.axhspan(harm.low, harm.high, color="grey", alpha=0.15, lw=0)
                    axis.axhline(harm.value, color="grey", lw=0.8, ls=":", label=name)
                    continue
                bars: dict[str, Any] = {
                    key: [[one.value - one.low], [one.high - one.value]]
                    for key, one in (("xerr", task), ("yerr", harm))
                }
                label = family if name == names[0] else None
                axis.errorbar(task.value, harm.value, **bars, fmt=mark, ms=4, lw=0.6, color=color, label=label)
            if len(kept := front(lines.get(family, []))) > 1:
                axis.plot(*zip(*kept, strict=True), lw=0.8, color=color)
        axis.set(title=place.title, xlabel="task score", ylabel="harmful prompts refused", ylim=(-0.02, 1.02))
        _leave_out_lost(grid, place, axis)
        axis.legend(fontsize=5, ncols=2)
    return figure


def _leave_out_lost(grid: Grid, place: Place, axis: Axes) -> None:
    """Begin the scores at the arms with a quarter of the best one's or more, and name the others.

    An arm that has lost its task, as one whose updates were projected away, would squeeze all others into a corner.
    """
    intervals = {name: place.interval(name, "task") for name in place.arms if grid.arms[name].kind != "model"}
    scores = {name: one for name, one in intervals.items() if one is not None}
    best = max((one.value for one in scores.values()), default=0.0)
    if lost := [name for name, one in scores.items() if one.value < best / 4]:
        axis.set_xlim(left=min(one.low for name, one in scores.items() if name not in lost) - 0.01)
        axis.set_xlabel(f"task score; left of it: {', '.join(lost)}")


def _looks(grid: Grid, places: Sequence[Place]) -> dict[str, tuple[str, str]]:
    """Each family's mark and color, the same in every panel."""
    families = dict.fromkeys(
        arm.family for name, arm in grid.arms.items() if any(name in place.arms for place in places)
    )
    return {family: (mark, f"C{n}") for n, (family, mark) in enumerate(zip(families, cycle(_MARKS), strict=False))}


def _steps(grid: Grid, places: Sequence[Place]) -> Figure | None:
    """The first seed's mean cosine by step, and its probes' harm and task where it was probed."""
    shown = [place for place in places if place.trails]
    if not shown:
        return None
    figure, axes = _panels(len(shown))
    for axis, place in zip(axes, shown, strict=True):
        for arm, trails in place.trails.items():
            if grid.arms[arm].kind != "train":
                continue
            checks = [(step, value) for step, value in trails[0]["checks"] if value is not None]
            if checks:
                axis.plot(*zip(*checks, strict=True), lw=0.9, marker=".", ms=3, label=f"{arm}: mean cosine")
            for measure in dict.fromkeys(m for _, values in trails[0]["probes"] for m in values):
                points = [(step, values.get(measure)) for step, values in trails[0]["probes"]]
                axis.plot(*zip(*points, strict=True), lw=0.9, ls="--", label=f"{arm}: {measure}")
        axis.set(title=place.title, xlabel="optimizer step", ylim=(-0.02, 1.02))
        # Where no arm of the place measures in training, there is nothing to name.
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=5, ncols=2, framealpha=0.5)
    return figure


def _modules(_: Grid, places: Sequence[Place]) -> Figure | None:
    """Arms by modules: in how many of the seeds' merges each module was merged, as a share."""
    shown = [place for place in places if any(t["merged"] for trails in place.trails.values() for t in trails)]
    if not shown:
        return None
    figure, axes = _panels(len(shown))
    for axis, place in zip(axes, shown, strict=True):
        arms = {arm: trails for arm, trails in place.trails.items() if any(t["merged"] for t in trails)}
        names = sorted({m for trails in arms.values() for t in trails for m in t["merged"]}, key=_by_layer)
        table = [
            [sum(t["merged"].get(name, 0) for t in trails) / max(1, sum(t["merges"] for t in trails)) for name in names]
            for trails in arms.values()
        ]
        shares = axis.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        figure.colorbar(shares, ax=axis)
        axis.set_yticks(range(len(arms)), list(arms), fontsize=5)
        axis.set(title=f"{place.title}: share of merges", xlabel=f"{len(names)} modules, by layer")
    return figure


def _by_layer(name: str) -> tuple[list[int], str]:
    return [int(part) for part in name.split(".") if part.isdecimal()], name


def write_drift_plot(adapters: Sequence[AdapterDrift], path: Path) -> Path:
    """Write each run's harm refused over three measures, those with a safety adapter merged in small."""
    measures = {"mean cosine": "cosine", "mean signed z": "signed_z", "mean signed z · ‖ΔW‖": "moved"}
    with _style():
        figure, axes = _panels(len(measures))
        for axis, (label, of) in zip(axes, measures.items(), strict=True):
            for place, share in enumerate(sorted({one.poisoned_share for one in adapters})):
                for merged in (True, False):
                    runs = [one for one in adapters if one.merged == merged and one.poisoned_share == share]
                    # In pairs of a dark and a light shade.
                    color = f"C{2 * place + merged}"
                    said = f"safety adapter {'merged in' if merged else 'not used'}, {100 * share:.0f} % poisoned"
                    x, y = [getattr(one, of) for one in runs], [one.harm for one in runs]
                    axis.plot(x, y, _MARKS[place], ms=3 if merged else 6, color=color, label=said)
            axis.set(xlabel=label, ylabel="harmful prompts refused", ylim=(-0.02, 1.02))
            axis.legend(fontsize=6)
        figure.savefig(path, format="svg", metadata=_METADATA, bbox_inches="tight")
    return path
