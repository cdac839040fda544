"""A search of coefficients as a picture: what each merge that was tried costs the task, and what it leaves of safety.

Apart from the plots, which draw a history.
"""

from __future__ import annotations

from pathlib import Path

from ..io.outputs import PICTURE, new_output
from ..offline.search_report import SearchReport
from .saving import figure_module
from .sweep_plot import check_picture


def write_front(report: SearchReport, path: str | Path) -> Path:
    """Draw the evaluations of all rows, task's term against safety's, a colour a stage; return the path.

    Both terms are better the lower. The fine-tuned model and the adapter that was written are named. ConfigError as
    `check_picture`, and where the file cannot be written.
    """
    target = check_picture(path)
    figure = figure_module().Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for stage in dict.fromkeys(one.stage for one in report.all_rows):
        points = sorted((one.task, one.safety) for one in report.all_rows if one.stage == stage)
        label = "fine-tuned" if stage == report.all_rows[0].stage else stage
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=0.8, label=label)
    if report.achieved is not None:
        axes.plot(*report.achieved, marker="*", markersize=12, linestyle="", color="black", label="as written")
    axes.set_xlabel(f"task rows ({report.settings.objective}), nats")
    axes.set_ylabel(f"safety rows ({report.settings.objective}), nats")
    axes.legend(fontsize="small")
    with new_output(path, "plot", PICTURE) as part:
        figure.savefig(part, dpi=160, facecolor="white", format=target.suffix[1:].lower())
    return target
