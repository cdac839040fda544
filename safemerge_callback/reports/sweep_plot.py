"""A sweep as a picture: what is merged, how far that moves the update, and what the rank loses.

Apart from the plots, which draw a history.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.outputs import PICTURE, free_output, new_output
from ..offline.sweep.table import Sweep, joined
from .saving import FORMATS, figure_module

_PANELS = (("merged", "modules merged"), ("moved", "‖new − old‖ / ‖old‖"), ("residual", "residual of the rank"))


def check_picture(path: str | Path) -> Path:
    """Return the path of a picture; ConfigError for another ending, for what is there
    and is no picture, or where matplotlib is not installed."""
    target = free_output(path, "plot", PICTURE)
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"plot {str(path)!r}: the name must end in one of {', '.join(FORMATS)}.")
    figure_module()
    return target


def write_plot(sweep: Sweep, path: str | Path) -> Path:
    """Draw three panels over the gates, a line for each method with its weights; return the path.

    Raises ConfigError as `check_picture`, and where the file cannot be written.
    """
    target = check_picture(path)
    figure = figure_module().Figure(figsize=(13, 4.2), layout="constrained")
    gates = list(dict.fromkeys((cell.gate, cell.knob) for cell in sweep))
    for axes, (field, label) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        _draw(axes, sweep, field)
        axes.set_xticks(range(len(gates)), [name if knob is None else f"{name} {knob:g}" for name, knob in gates])
        axes.tick_params(axis="x", rotation=60)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    with new_output(path, "plot", PICTURE) as part:
        figure.savefig(part, dpi=160, facecolor="white", format=target.suffix[1:].lower())
    return target


def _draw(axes: Any, sweep: Sweep, field: str) -> None:
    lines: dict[str, list[float]] = {}
    for cell in sweep:
        lines.setdefault(f"{cell.method} {joined(cell.weights)}", []).append(getattr(cell, field))
    for label, values in lines.items():
        axes.plot(range(len(values)), values, marker="o", markersize=3, linewidth=1.2, label=label)
