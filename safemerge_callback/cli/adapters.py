"""Verbs on adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import (
    Bar,
    Density,
    Device,
    GateName,
    MajoritySign,
    NumLayers,
    Quantile,
    ReferenceFraction,
    Seed,
    Soft,
    SubspaceFile,
    Threshold,
    ZThreshold,
    device_named,
    gate_options,
    working,
)


@app.command()
def measure(
    finetuned: Annotated[str, typer.Argument(help="LoRA adapter: folder or Hub id.")],
    subspace: SubspaceFile,
    threshold: Annotated[float | None, typer.Option(help="Also list the modules whose cosine is below it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    device: Device = "cpu",
    progress: Bar = True,
) -> None:
    """Measure how far each module of an adapter has drifted from the safety subspace; no model is loaded."""
    from ..decision.gates.checks import check_threshold
    from ..offline import measure_adapter
    from ..reports import readings_json, readings_text

    if threshold is not None:
        check_threshold(threshold)
    with working(f"measuring {finetuned}", progress):
        readings = measure_adapter(finetuned, subspace, device=device_named(device))
    typer.echo(readings_json(readings, threshold) if as_json else readings_text(readings, threshold))


@app.command()
def merge(
    finetuned: Annotated[str, typer.Argument(help="Fine-tuned LoRA adapter: folder or Hub id.")],
    subspace: SubspaceFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the merged adapter to.")],
    safety: Annotated[str | None, typer.Argument(help="Safety LoRA adapter; method project needs none.")] = None,
    gate: GateName = None,
    threshold: Threshold = 0.35,
    num_layers: NumLayers = None,
    quantile: Quantile = None,
    z_threshold: ZThreshold = None,
    reference_fraction: ReferenceFraction = None,
    seed: Seed = 0,
    soft: Soft = False,
    method: Annotated[
        str, typer.Option(help="linear (keeps the rank), cat (no loss, ranks add), project, ties, dare_linear, ...")
    ] = "linear",
    space: Annotated[str, typer.Option(help="delta: sum of the updates; factor: PEFT's sum of the factors.")] = "delta",
    weights: Annotated[tuple[float, float], typer.Option(help="Of the fine-tuned and the safety update.")] = (0.8, 0.2),
    density: Density = None,
    majority_sign_method: MajoritySign = "total",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in OUT already.")] = False,
    device: Device = "cpu",
    progress: Bar = True,
) -> None:
    """Merge a safety adapter into the drifted modules of a fine-tuned one; no model is loaded."""
    from ..offline import merge_adapters

    with working(f"merging {finetuned}", progress):
        plan = merge_adapters(
            finetuned,
            safety,
            subspace,
            output,
            **gate_options(
                gate,
                threshold=threshold,
                num_layers=num_layers,
                quantile=quantile,
                z_threshold=z_threshold,
                reference_fraction=reference_fraction,
                seed=seed,
                soft=soft,
            ),
            method=method,
            space=space,
            weights=weights,
            density=density,
            majority_sign_method=majority_sign_method,
            overwrite=overwrite,
            device=device_named(device),
        )
    typer.echo(f"{plan}\n{output}: {len(plan.selected)} of {len(plan.readings)} modules merged")
