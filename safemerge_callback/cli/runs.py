"""Verbs on the output folder of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Screen, Verb, app, examples, show

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its journal (safemerge.jsonl).")]


@app.command(cls=Verb, epilog=examples("undo RUN"))
def undo(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a training, or a checkpoint in it.")],
) -> None:
    """Give an adapter the factors it had before its final merge; the merged one is kept in RUN/merged."""
    from ..offline.undo import take_back

    names, kept = take_back(run)
    text = f"{run}: {len(names)} modules are as before the final merge; the merged adapter is in {kept}"
    show(text, {"run": run, "modules": names, "merged_adapter": kept})


@app.command(cls=Verb, epilog=examples("report RUN", "report RUN -o drift.png"))
def report(
    journal: Run,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="What to write: a page (.html), or a plot (.png, .svg or .pdf; needs matplotlib). "
            "[default: RUN/safemerge_report.html]",
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            help="Which plot: heatmap, moved, trajectories, weights, losses or probe. [default: what there is]"
        ),
    ] = None,
) -> None:
    """Summarise a run from its journal, and write a page that shows how every module drifted and what was replayed."""
    from ..io.choices import one_of
    from ..reports import PLOTS, read_history, summary, summary_document, write_report

    if plot is not None:
        one_of(plot, PLOTS, "plot")
    history = read_history(journal)
    drift = history.modules or not history.terms
    what = f"drift of {len(history.modules)} modules" if drift else ", ".join(history.terms)
    place = write_report(history, output or journal, plot)
    show(f"{summary(history)}\n{place}: {what}", {"output": place, **summary_document(history)})


@app.command(cls=Screen, epilog=examples("watch RUN"))
def watch(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds from one look at the journal to the next.")] = 1.0,
) -> None:
    """Follow a run in the terminal while it trains: last check, worst modules, merges, probes. Ctrl-C leaves."""
    from ..reports import watch_run

    watch_run(run, once=once, every=every)
