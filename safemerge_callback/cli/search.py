"""The verb that lets a few rows choose how much of each update a merge takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Verb, app, examples, note, show
from .options import Bar, SubspaceFile, device_named

_Finetuned = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Fine-tuned LoRA adapter: folder or Hub id, org/name[@revision].")
]
_Safety = Annotated[
    list[str] | None,
    typer.Argument(metavar="SAFETY", help="Safety LoRA adapters; none: pull toward the aligned model."),
]
_TaskRows = Annotated[str, typer.Option(help="The task's rows, or its prompts: .jsonl, .csv, .json, or a Hub id.")]
_SafetyRows = Annotated[str, typer.Option(help="Safety rows, or prompts: as `safemerge harvest` writes them.")]
_Output = Annotated[str, typer.Option("--output", "-o", help="Folder to write the result to.")]
_Objective = Annotated[str, typer.Option(help="kl, cross_entropy, entropy or cocktail.")]
_Granularity = Annotated[str, typer.Option(help="One coefficient for the run, a block, or a module.")]
_Minimiser = Annotated[
    str | None, typer.Option(help="golden, gradient, cma or tezo. [default: golden for run, else gradient]")
]
_Share = Annotated[float, typer.Option(min=0.0, help="What a safety row counts against a task row, μ.")]
_Penalty = Annotated[float, typer.Option(min=0.0, help="On how far many coefficients are from the best one, in nats.")]
_Evaluations = Annotated[
    int | None, typer.Option(min=1, help="Losses or gradients at most. [default: the minimiser's]")
]
_Temperature = Annotated[float, typer.Option(help="Of objective cocktail.")]
_Method = Annotated[str, typer.Option(help="linear, at the live rank, or cat, whole: with a safety adapter.")]
_Rows = Annotated[int, typer.Option(min=1, help="Rows of each kind at most, by --seed.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Rows a pass, and of each kind a step.")]
_Seed = Annotated[int, typer.Option(help="What chooses the rows, and draws.")]
_Plot = Annotated[Path | None, typer.Option(help="Picture of the front: .png, .pdf or .svg (needs matplotlib).")]
_Base = Annotated[str | None, typer.Option(help="The adapter's base model; left out: what its config names.")]
_Kwargs = Annotated[
    str | None, typer.Option(help="JSON for the chat template, such as '{\"enable_thinking\": false}'.")
]
_Force = Annotated[bool, typer.Option("--force", "--overwrite", help="Replace a merge that is in OUT already.")]
_Dtype = Annotated[str, typer.Option(help="The model's dtype, or auto: as in its checkpoint.")]
_Device = Annotated[str | None, typer.Option(help="Where to compute; left out: an accelerator, if any.")]


@app.command(
    cls=Verb,
    epilog=examples(
        "search ADAPTER SAFETY -s S --task-rows train.jsonl --safety-rows rows.jsonl -o OUT",
        "search ADAPTER -s S --task-rows T --safety-rows R --granularity block --plot front.png -o OUT",
    ),
)
def search(
    finetuned: _Finetuned,
    subspace: SubspaceFile,
    task_rows: _TaskRows,
    safety_rows: _SafetyRows,
    output: _Output,
    safety: _Safety = None,
    objective: _Objective = "kl",
    granularity: _Granularity = "run",
    minimiser: _Minimiser = None,
    share: _Share = 1.0,
    penalty: _Penalty = 0.1,
    evaluations: _Evaluations = None,
    temperature: _Temperature = 1.0,
    method: _Method = "linear",
    rows: _Rows = 64,
    batch_size: _BatchSize = 16,
    seed: _Seed = 0,
    plot: _Plot = None,
    base: _Base = None,
    chat_template_kwargs: _Kwargs = None,
    force: _Force = False,
    dtype: _Dtype = "auto",
    device: _Device = None,
    progress: Bar = True,
) -> None:
    """Let task rows and safety rows choose how much of each update a merge takes, and make it; the model is loaded.

    Exits with 1 where no coefficient lowers the objective: OUT is then the fine-tuned adapter as it was.
    """
    from ..offline.search import Opening, search_merge
    from ..reports.search_plot import write_front
    from ..reports.sweep_plot import check_picture
    from ..signals.chat import template_settings
    from ..signals.coefficients import SearchSettings

    if plot is not None:
        check_picture(plot)
    settings = SearchSettings(
        objective, granularity, minimiser, share, penalty, evaluations, batch_size, temperature, seed
    )
    where = None if device is None else device_named(device)
    report = search_merge(
        finetuned,
        safety,
        subspace,
        output,
        task_rows=task_rows,
        safety_rows=safety_rows,
        settings=settings,
        method=method,
        rows=rows,
        opening=Opening(base, dtype, where, template_settings(chat_template_kwargs)),
        overwrite=force,
        progress=progress,
    )
    show(f"{report}\n{output}: written", {"output": output, "plot": plot, **report.to_dict()})
    if plot is not None:
        note(f"{write_front(report, plot)}: {len(report.all_rows)} merges")
    if not report.learned.improved:
        raise typer.Exit(1)
