"""Verbs on adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Verb, app, examples, note, show
from .options import (
    AllowEmpty,
    AskedModel,
    Baked,
    Bar,
    Density,
    Device,
    GateName,
    MajoritySign,
    ManyKnobs,
    ManyWeights,
    MethodName,
    NumLayers,
    Operator,
    OperatorRank,
    Quantile,
    ReferenceFraction,
    SafetyRows,
    Seed,
    Soft,
    Space,
    Strength,
    SubspaceFile,
    TaskRows,
    Threshold,
    WithWeights,
    ZThreshold,
    align_of,
    device_named,
    gate_options,
    gates_named,
    knobs_of,
    names_listed,
    weights_listed,
    weights_of,
    working,
)

if TYPE_CHECKING:
    from ..decision import MergePlan


@app.command(cls=Verb, epilog=examples("measure ADAPTER -s S"))
def measure(
    finetuned: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="LoRA adapter: folder or Hub id, org/name[@revision].")
    ],
    subspace: SubspaceFile,
    threshold: Annotated[float | None, typer.Option(help="Also list the modules whose cosine is below it.")] = None,
    device: Device = "cpu",
    progress: Bar = True,
) -> None:
    """Measure how far each module's update goes along the safety subspace, and its cosine; no model is loaded."""
    from ..decision.gates.checks import check_threshold
    from ..offline import measure_adapter
    from ..reports import readings_document, readings_text

    if threshold is not None:
        check_threshold(threshold)
    with working(f"measuring {finetuned}", progress):
        readings = measure_adapter(finetuned, subspace, device=device_named(device))
    show(readings_text(readings, threshold), readings_document(readings, threshold))


@app.command(
    cls=WithWeights,
    epilog=examples(
        "merge ADAPTER SAFETY -s S -o OUT",
        "merge ADAPTER -s S --strength 0.2 -o OUT",
        "merge ADAPTER SAFETY -s S --threshold 0.35 --weights 0.8 0.2 -o OUT",
        "merge ADAPTER -s S --method regmean --task-rows T.jsonl --safety-rows R.jsonl -o OUT",
        "merge --config OUT/safemerge.yaml -o AGAIN",
    ),
)
def merge(
    finetuned: Annotated[
        str | None,
        typer.Argument(metavar="ADAPTER", help="Fine-tuned LoRA adapter: folder or Hub id, org/name[@revision]."),
    ] = None,
    safety: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SAFETY", help="Safety LoRA adapters, one or more; none: pull toward the aligned model."
        ),
    ] = None,
    subspace: Annotated[
        str | None, typer.Option("--subspace", "-s", help="Subspace: file or Hub id, org/name[@revision].")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write the result to.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with these settings by name; what is given here overrides it.")
    ] = None,
    bake: Baked = None,
    task_rows: TaskRows = None,
    safety_rows: SafetyRows = None,
    base: AskedModel = None,
    gate: GateName = None,
    threshold: Threshold = None,
    num_layers: NumLayers = None,
    quantile: Quantile = None,
    z_threshold: ZThreshold = None,
    reference_fraction: ReferenceFraction = None,
    seed: Seed = None,
    soft: Soft = None,
    method: MethodName = None,
    space: Space = None,
    weights: ManyWeights = None,
    strength: Strength = None,
    operator: Operator = None,
    operator_rank: OperatorRank = None,
    density: Density = None,
    majority_sign_method: MajoritySign = None,
    knob: ManyKnobs = None,
    force: Annotated[
        bool | None, typer.Option("--force", "--overwrite", help="Replace a merge that is in OUT already.")
    ] = None,
    allow_empty: AllowEmpty = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ... [default: cpu]")] = None,
    progress: Bar = True,
) -> None:
    """Merge safety adapters into a fine-tuned one, or pull it toward the aligned model; no model is loaded.

    Exits with 1 where the gate selects no module.
    """
    options = {name: value for name, value in locals().items() if name not in ("config", "progress", "weights", "knob")}
    options["weights"] = weights_of(weights)
    options = {name: value for name, value in options.items() if value not in (None, [])}
    settings = _settings(config, {**options, **_knobs(knob, options)})
    from ..offline import merge_adapters

    allowed = settings.pop("allow_empty", False)
    parts = [settings.pop(part, None) for part in ("finetuned", "safety", "subspace", "output")]
    with working(f"merging {parts[0]}", progress):
        plan = merge_adapters(*parts, overwrite=settings.pop("force", False), **settings)
    show(f"{plan}\n{parts[3]}: {_merged(plan)}", {"output": parts[3], **plan.to_dict()})
    if not plan.selected and not allowed:
        raise typer.Exit(1)


@app.command(
    cls=Verb,
    epilog=examples(
        "bake ADAPTER --base ORG/CHAT -o FULL",
        "bake ADAPTER --base ORG/CHAT --align 1.1 -s S -o FULL",
        "bake --base ORG/CHAT --align v_proj=1.5,o_proj=1.2 --align-rank 6 -s S -o FULL",
    ),
)
def bake(
    base: Annotated[str, typer.Option(help="Aligned base model of the adapter: folder or Hub id.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write the checkpoint to.")],
    adapter: Annotated[
        str | None, typer.Argument(metavar="ADAPTER", help="LoRA adapter: folder or Hub id; none: the base alone.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            help="How often the weights have the alignment vector: one number, or PATTERN=NUMBER with commas. "
            "[default: 1, as the aligned model]"
        ),
    ] = None,
    align_rank: Annotated[
        int | None, typer.Option(help="Go beyond 1 only along so many leading directions of the vector.")
    ] = None,
    subspace: Annotated[
        str | None, typer.Option("--subspace", "-s", help="Subspace file of that base, which holds the vector.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "--overwrite", help="Replace such a checkpoint in FULL.")] = False,
    device: Device = "cpu",
    progress: Bar = True,
) -> None:
    """Write a full checkpoint: the adapter added into its base, with more of the alignment vector if asked."""
    from ..offline import bake_adapter

    with working(f"baking {adapter or base}", progress):
        folder = bake_adapter(
            adapter,
            base,
            output,
            align=align_of(align),
            align_rank=align_rank,
            subspace=subspace,
            overwrite=force,
            device=device_named(device),
        )
    show(f"{folder}: a full checkpoint", {"output": folder, "adapter": adapter, "base": base})


def _merged(plan: MergePlan) -> str:
    return f"{len(plan.selected)} of {len(plan.readings)} modules merged"


def _knobs(words: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """The knobs of a merge that were given by `--knob`."""
    if not words:
        return {}
    from ..decision.gates import gate_knobs
    from ..decision.weights import weights_knobs
    from ..methods.how import how_knobs

    return knobs_of(words, options, (*gate_knobs(), *how_knobs(), *weights_knobs()), "a merge")


def _settings(config: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """The file's settings with those of the command line over them; ConfigError where a part is missing."""
    from ..errors import ConfigError
    from ..offline.merge_yaml import gate_settings, read_recipe

    in_file = {} if config is None else read_recipe(config)
    beside_the_gate = {"seed", "soft"}
    if (
        gate_settings(options).keys() - beside_the_gate
    ):  # another gate, or its knob: the file's gate and its knob go together
        in_file = {
            name: value
            for name, value in in_file.items()
            if name in beside_the_gate or name not in gate_settings(in_file)
        }
    merged = in_file | options
    lacking = [name for name in ("finetuned", "subspace", "output") if merged.get(name) is None]
    if lacking:
        advice = " (`safemerge build` makes a subspace)" if "subspace" in lacking else ""
        words = f"{' and '.join(lacking)} not given"
        raise ConfigError(f"{words}: name them on the command line, or in a --config file{advice}")
    knobs = gate_settings(merged)
    rest = {name: value for name, value in merged.items() if name not in knobs}
    rest["device"] = device_named(str(rest.get("device", "cpu")))
    return {**rest, **gate_options(**{"gate": None, **knobs})}


@app.command(
    cls=Verb,
    epilog=examples(
        "sweep ADAPTER SAFETY -s S -o sweep.csv",
        "sweep ADAPTER SAFETY -s S --gates all,num_layers=10 --methods linear,ties --density 0.5",
    ),
)
def sweep(
    finetuned: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Fine-tuned LoRA adapter: folder or Hub id, org/name[@revision].")
    ],
    subspace: SubspaceFile,
    safety: Annotated[
        list[str] | None, typer.Argument(metavar="SAFETY", help="Safety LoRA adapters, one or more.")
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(help="Cosines, with commas. [default: gate all, and 0.2,0.25,...,0.55, without --gates]"),
    ] = None,
    gates: Annotated[
        str | None, typer.Option(help="More gates, with commas, their knob after =: calibrated=-2,num_layers=10,all")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Task's and safety's weights, / between, and commas between one set and the next.")
    ] = "0.9/0.1,0.8/0.2,0.7/0.3,0.6/0.4,0.5/0.5",
    methods: Annotated[str, typer.Option(help="Methods, with commas.")] = "auto",
    space: Space = None,
    density: Density = None,
    majority_sign_method: MajoritySign = None,
    knob: ManyKnobs = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV file to write, one row a merge.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: .png, .pdf or .svg (needs matplotlib).")] = None,
    device: Device = "cpu",
    progress: Bar = True,
) -> None:
    """Tell what merges would do, for gates x weights x methods, without making one; no model is loaded."""
    from ..io.outputs import free_output
    from ..methods.registry import knobs as declared
    from ..offline import sweep_adapters
    from ..offline.sweep.table import TABLE
    from ..reports.sweep_plot import check_picture, write_plot

    gates_listed = gates_named(thresholds, gates)
    options: dict[str, Any] = {"space": space, "density": density, "majority_sign_method": majority_sign_method}
    options = {name: value for name, value in options.items() if value is not None}
    if output is not None:
        free_output(output, "table", TABLE)
    if plot is not None:
        check_picture(plot)
    with working(f"sweeping {finetuned}", progress):
        table = sweep_adapters(
            finetuned,
            safety or None,
            subspace,
            gates=gates_listed,
            weights=weights_listed(weights),
            methods=names_listed(methods),
            device=device_named(device),
            **options,
            **knobs_of(knob, options, tuple(declared()), "a sweep"),
        )
    show(str(table), {"output": output, "plot": plot, "modules": len(table.readings), "merges": table.to_dicts()})
    if output is not None:
        note(f"{table.write_csv(output)}: {len(table)} rows")
    if plot is not None:
        note(f"{write_plot(table, plot)}: {len(table)} merges")
