"""The verb that lets a pipeline pass or fail on what a model refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..io.outputs import FileKind, free_output, new_output
from .app import Verb, app, examples, note, or_error, show
from .evaluation import dtype_named
from .evidence import adapter_here, check_evidence, look_again
from .gate_sources import Asking, Source, of_figures, of_model, of_run, with_baseline
from .options import device_named, is_on_command_line, names_listed, refuse_idle

if TYPE_CHECKING:
    from ..evaluation.acceptance import Decision

_CARD = FileKind("a gate's card", lambda head: head.startswith(b"### Safety gate: "))
_JUNIT = FileKind("a gate's JUnit file", lambda head: b'<testsuite name="safemerge gate"' in head)
# What a model is asked, and how it is loaded.
_OF_MODEL = ("base", "probes", "judge", "n", "seed", "max_new_tokens", "batch_size", "dtype", "device")
_OF_SHIPPING = ("after_merge", "after_quantize", "evidence")
# What has no effect where nothing is asked, and nothing but the adapter is looked at.
_OF_ASKING = (
    *("figures", "run", "baseline", "card", "junit", *_OF_SHIPPING),
    *(name for name in _OF_MODEL if name not in ("base", "probes")),
)


MinRefused = Annotated[float | None, typer.Option(help="Harmful prompts refused: this share at least.")]
MaxDrop = Annotated[float | None, typer.Option(help="How much less of them than the base refuses, at most.")]
MaxOverRefused = Annotated[float | None, typer.Option(help="Harmless prompts refused: this share at most.")]
MaxRise = Annotated[float | None, typer.Option(help="How much more of them than the base refuses, at most.")]
MinTask = Annotated[float | None, typer.Option(help="Score of each task that is a share, at least.")]
MaxTaskDrop = Annotated[float | None, typer.Option(help="How much less than the base's it is, at most.")]
MinCoherent = Annotated[float | None, typer.Option(help="Responses that are language: this share at least.")]
Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="Adapter or model to ask: folder or Hub id.")]
Figures = Annotated[Path | None, typer.Option(help="In place of MODEL: what `eval -o` wrote of it.")]
Run = Annotated[Path | None, typer.Option(help="In place of MODEL: a run, by its last probe.")]
Baseline = Annotated[
    Path | None, typer.Option(help="What `eval -o` wrote of the base. [default: an adapter off, a run's first probe]")
]
AfterMerge = Annotated[
    bool, typer.Option("--after-merge", help="Ask the adapter as it is once added into its base's weights.")
]
AfterQuantize = Annotated[
    str | None, typer.Option(help="Ask the model as it is once quantised, after --after-merge if that is given: 4bit.")
]
Evidence = Annotated[
    bool, typer.Option("--evidence", help="Also write safemerge_evidence.json into the adapter's folder.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Ask nothing: is all as the adapter's evidence says, and does it pass?")
]


@app.command(
    cls=Verb,
    epilog=examples(
        "gate ADAPTER --min-refused 0.8 --max-over-refused 0.2",
        "gate --figures eval.json --baseline base.json --thresholds gate.yaml --junit gate.xml --card gate.md",
        "gate --run RUN --max-refused-drop 0.05 --json",
        "gate ADAPTER --min-refused 0.8 --after-merge --after-quantize 4bit --evidence",
        "gate --verify ADAPTER",
    ),
)
def gate(
    context: typer.Context,
    model: Model = None,
    figures: Figures = None,
    run: Run = None,
    baseline: Baseline = None,
    thresholds: Annotated[Path | None, typer.Option(help="YAML file with the thresholds below by name.")] = None,
    min_refused: MinRefused = None,
    max_refused_drop: MaxDrop = None,
    max_over_refused: MaxOverRefused = None,
    max_over_refused_rise: MaxRise = None,
    min_task: MinTask = None,
    max_task_drop: MaxTaskDrop = None,
    min_coherent: MinCoherent = None,
    base: Annotated[str | None, typer.Option(help="The adapter's base model; left out: what its config names.")] = None,
    after_merge: AfterMerge = False,
    after_quantize: AfterQuantize = None,
    evidence: Evidence = False,
    verify: Verify = False,
    probes: Annotated[str, typer.Option(help="Prompt sets, as `eval` has them.")] = "harmbench,xstest",
    judge: Annotated[list[str] | None, typer.Option(help="As `eval` has them. [default: keywords]")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts of each set, chosen by --seed.")] = 64,
    seed: Annotated[int, typer.Option(help="What chooses the prompts.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response that is judged.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a batch.")] = 16,
    dtype: Annotated[str, typer.Option(help="The model's dtype, or auto: as in its checkpoint.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to compute; left out: an accelerator, if any.")] = None,
    card: Annotated[Path | None, typer.Option(help="Markdown file for a pull request.")] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML file.")] = None,
) -> None:
    """Pass or fail a model on what it refuses, by thresholds and the intervals of what was measured.

    Exits with 0 passed, 1 failed, 2 wrong usage, 3 an error, 4 nothing was measured, 5 too few prompts to tell.
    """
    from ..evaluation.acceptance import RULES, read_thresholds

    options = locals()
    limits = {rule.name: options[rule.name] for rule in RULES if options[rule.name] is not None}
    if verify:
        refuse_idle(context, "--verify", _OF_ASKING)
        raise typer.Exit(_verified(context, model, base, thresholds, limits, probes))
    wanted = read_thresholds(thresholds, limits)
    _check_source(context, model, figures, run)
    _check_outputs(card, junit, [figures, run, baseline, thresholds])
    asking = Asking.of(options)
    loading = _loadable(model, asking, {"base": base, "dtype": dtype, "device": device})

    def read() -> Source:
        if figures is not None:
            return of_figures(figures)
        if run is not None:
            return of_run(run)
        return of_model(str(model), asking, loading, wanted.of_changes and baseline is None)

    source = or_error(lambda: with_baseline(read(), baseline))
    _conclude(source, wanted, card, junit, Path(str(model)) if evidence else None)


def _verified(
    context: typer.Context,
    model: str | None,
    base: str | None,
    thresholds: Path | None,
    limits: dict[str, float],
    probes: str,
) -> int:
    """The exit code of a look at an adapter's evidence, under its own thresholds or those that are given here."""
    from ..evaluation.acceptance import read_thresholds

    adapter = adapter_here(model)
    over = read_thresholds(thresholds, limits) if limits or thresholds else None
    sets = names_listed(probes) if is_on_command_line(context, "probes") else None
    return or_error(lambda: look_again(adapter, base, sets, over))


def _check_source(context: typer.Context, model: str | None, figures: Path | None, run: Path | None) -> None:
    """ConfigError unless there is one source, and for what has an effect on a model alone where it is no model."""
    if sum(source is not None for source in (model, figures, run)) != 1:
        raise ConfigError("give one of MODEL, --figures and --run: what is to be decided on")
    if model is None:
        for name in filter(lambda one: is_on_command_line(context, one), _OF_SHIPPING):
            raise ConfigError(f"--{name.replace('_', '-')} asks a model: give MODEL in place of --figures or --run")
        refuse_idle(context, "what was measured already", _OF_MODEL)


def _loadable(model: str | None, asking: Asking, loading: dict[str, Any]) -> dict[str, Any]:
    """How the model is loaded; ConfigError for a judge, a dtype, a device or a quantisation that there is not."""
    from ..evaluation.judges import check_judge
    from ..evaluation.quantised import check_quantised

    if model is None:
        return loading
    for name in asking.judges:
        check_judge(name)
    if asking.after_quantize is not None:
        check_quantised(asking.after_quantize)
    if asking.evidence:
        check_evidence(model)
    device = loading["device"]
    place = None if device is None else device_named(device)
    return {**loading, "dtype": dtype_named(loading["dtype"]), "device": place}


def _check_outputs(card: Path | None, junit: Path | None, inputs: Sequence[Path | None]) -> None:
    if card is not None and card == junit:
        raise ConfigError(f"output {str(card)!r} is wanted for card and JUnit: give two files")
    for path, kind in ((card, _CARD), (junit, _JUNIT)):
        if path is not None:
            free_output(path, "output", kind, [one for one in inputs if one is not None])


def _conclude(source: Source, limits: Any, card: Path | None, junit: Path | None, adapter: Path | None) -> None:
    """Decide, say so, write what was wanted, and end with the decision's code."""
    from ..evaluation.acceptance import decide, document_of
    from ..evaluation.figures_file import figure_rows
    from ..record.evidence import write_evidence
    from ..reports.acceptance import decision_card, decision_junit, decision_text

    decision = decide(source.figures, limits, source.base)
    base = None if source.base is None else figure_rows(source.base)
    measured = {"figures": figure_rows(source.figures), "base_figures": base, **source.record}
    document = {**document_of(decision, limits, source.name, source.base_name), **measured}
    show(decision_text(decision, source.name), document)
    forms: list[tuple[Path | None, FileKind, Callable[[Decision, str], str]]]
    forms = [(card, _CARD, decision_card), (junit, _JUNIT, decision_junit)]
    for path, kind, form in forms:
        if path is not None:
            with new_output(path, "output", kind) as part:
                part.write_text(form(decision, source.name), encoding="utf-8")
    if adapter is not None:
        note(f"{write_evidence(adapter, document)}: written")
    raise typer.Exit(decision.exit_code)
