"""Verbs on the output folder of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def undo(
    run: Annotated[Path, typer.Argument(help="Output folder of a training, or a checkpoint in it.")],
) -> None:
    """Give an adapter the factors it had before its final merge; the merged one is kept in RUN/merged."""
    from ..offline import undo_merge

    names = undo_merge(run)
    typer.echo(f"{run}: {len(names)} modules are as before the final merge; the merged adapter is in {run / 'merged'}")


@app.command()
def report(
    journal: Annotated[Path, typer.Argument(help="A journal (safemerge.jsonl), or the folder of its run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Heat map to draw: .png, .pdf or .svg (needs matplotlib).")
    ] = None,
) -> None:
    """Summarise a run from its journal, and draw how every module drifted."""
    from ..reports import read_history, summary, write_heat_map

    history = read_history(journal)
    typer.echo(summary(history))
    if output is not None:
        typer.echo(f"{write_heat_map(history, output)}: drift of {len(history.modules)} modules")
