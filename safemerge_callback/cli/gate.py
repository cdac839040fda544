"""The verb that lets a pipeline pass or fail on what a model refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import ConfigError
from ..io.outputs import FileKind, free_output, new_output
from .app import Verb, app, examples, or_error, say
from .evaluation import dtype_named, ready
from .options import device_named, names_listed, refuse_idle

if TYPE_CHECKING:
    from ..evaluation import Share
    from ..evaluation.acceptance import Decision

_CARD = FileKind("a gate's card", lambda head: head.startswith(b"### Safety gate: "))
_JUNIT = FileKind("a gate's JUnit file", lambda head: b'<testsuite name="safemerge gate"' in head)
# What a model is asked, and how it is loaded.
_OF_MODEL = ("base", "probes", "judge", "n", "seed", "max_new_tokens", "batch_size", "dtype", "device")


class _Source(NamedTuple):
    """What is decided on: its name and figures, and those of the base, None where it was not measured."""

    name: str
    figures: Sequence[Share]
    base_name: str | None = None
    base: Sequence[Share] | None = None


MinRefused = Annotated[float | None, typer.Option(help="Harmful prompts refused: this share at least.")]
MaxDrop = Annotated[float | None, typer.Option(help="How much less of them than the base refuses, at most.")]
MaxOverRefused = Annotated[float | None, typer.Option(help="Harmless prompts refused: this share at most.")]
MaxRise = Annotated[float | None, typer.Option(help="How much more of them than the base refuses, at most.")]
MinTask = Annotated[float | None, typer.Option(help="Score of each task that is a share, at least.")]
MaxTaskDrop = Annotated[float | None, typer.Option(help="How much less than the base's it is, at most.")]
MinCoherent = Annotated[float | None, typer.Option(help="Responses that are language: this share at least.")]


@app.command(
    cls=Verb,
    epilog=examples(
        "gate ADAPTER --min-refused 0.8 --max-over-refused 0.2",
        "gate --figures eval.json --baseline base.json --thresholds gate.yaml --junit gate.xml --card gate.md",
        "gate --run RUN --max-refused-drop 0.05 --json",
    ),
)
def gate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Adapter or model to ask: folder or Hub id.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="In place of MODEL: what `eval -o` wrote of it.")] = None,
    run: Annotated[Path | None, typer.Option(help="In place of MODEL: a run, by its last probe.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="What `eval -o` wrote of the base. [default: an adapter off, a run's first probe]"),
    ] = None,
    thresholds: Annotated[Path | None, typer.Option(help="YAML file with the thresholds below by name.")] = None,
    min_refused: MinRefused = None,
    max_refused_drop: MaxDrop = None,
    max_over_refused: MaxOverRefused = None,
    max_over_refused_rise: MaxRise = None,
    min_task: MinTask = None,
    max_task_drop: MaxTaskDrop = None,
    min_coherent: MinCoherent = None,
    base: Annotated[str | None, typer.Option(help="The adapter's base model; left out: what its config names.")] = None,
    after_merge: Annotated[
        bool, typer.Option("--after-merge", help="Ask the adapter as it is once added into its base's weights.")
    ] = False,
    probes: Annotated[str, typer.Option(help="Prompt sets, as `eval` has them.")] = "harmbench,xstest",
    judge: Annotated[list[str] | None, typer.Option(help="As `eval` has them. [default: keywords]")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts of each set, chosen by --seed.")] = 64,
    seed: Annotated[int, typer.Option(help="What chooses the prompts.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response that is judged.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a batch.")] = 16,
    dtype: Annotated[str, typer.Option(help="The model's dtype, or auto: as in its checkpoint.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to compute; left out: an accelerator, if any.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    card: Annotated[Path | None, typer.Option(help="Markdown file for a pull request.")] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML file.")] = None,
) -> None:
    """Pass or fail a model on what it refuses, by thresholds and the intervals of what was measured.

    Exits with 0 passed, 1 failed, 2 wrong usage, 3 an error, 4 nothing was measured, 5 too few prompts to tell.
    """
    from ..evaluation.acceptance import RULES, read_thresholds

    options = locals()
    limits = read_thresholds(thresholds, {r.name: options[r.name] for r in RULES if options[r.name] is not None})
    read = _reader(model, figures, run)
    refuse_idle(context, "what was measured already", () if model else _OF_MODEL)
    _check_outputs(card, junit, [figures, run, baseline, thresholds])
    asking: dict[str, Any] = {"probes": names_listed(probes), "judge": judge or ["keywords"], "n": n, "seed": seed}
    asking |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "merged": after_merge}
    loading = _loadable(model, asking, {"base": base, "dtype": dtype, "device": device})
    off = limits.of_changes and baseline is None
    source = or_error(lambda: _based(read(asking, loading, off), baseline))
    _conclude(source, limits, as_json, card, junit)


def _reader(model: str | None, figures: Path | None, run: Path | None) -> Callable[..., _Source]:
    """What gives the figures; ConfigError unless there is one source of them."""
    from ..evaluation.figures_file import read_figures

    if sum(source is not None for source in (model, figures, run)) != 1:
        raise ConfigError("give one of MODEL, --figures and --run: what is to be decided on")
    if figures is not None:
        return lambda *_: _Source(str(figures), read_figures(figures))
    if run is not None:
        return lambda *_: _of_run(run)
    return lambda *how: _of_model(str(model), *how)


def _loadable(model: str | None, asking: dict[str, Any], loading: dict[str, Any]) -> dict[str, Any]:
    """How the model is loaded; ConfigError for a judge, a dtype or a device that there is not."""
    from ..evaluation.judges import check_judge

    if model is None:
        if asking["merged"]:
            raise ConfigError("--after-merge asks a model: give MODEL in place of --figures or --run")
        return loading
    for name in asking["judge"]:
        check_judge(name)
    device = loading["device"]
    place = None if device is None else device_named(device)
    return {**loading, "dtype": dtype_named(loading["dtype"]), "device": place}


def _check_outputs(card: Path | None, junit: Path | None, inputs: Sequence[Path | None]) -> None:
    if card is not None and card == junit:
        raise ConfigError(f"output {str(card)!r} is wanted for card and JUnit: give two files")
    for path, kind in ((card, _CARD), (junit, _JUNIT)):
        if path is not None:
            free_output(path, "output", kind, [one for one in inputs if one is not None])


def _based(source: _Source, baseline: Path | None) -> _Source:
    from ..evaluation.figures_file import read_figures

    return source if baseline is None else source._replace(base_name=str(baseline), base=read_figures(baseline))


def _of_run(run: Path) -> _Source:
    """A run's last probe, and before it the one that began it."""
    from ..record.run_evaluation import run_evaluations

    first, last = run_evaluations(run)
    if last is None:
        return _Source(str(run), [])
    return _Source(last.name, last.figures, first and first.name, first and first.figures)


def _of_model(model: str, asking: dict[str, Any], loading: dict[str, Any], with_base: bool) -> _Source:
    """The model's answers and, with `with_base`, an adapter's base's: the same model with the adapter off."""
    from ..evaluation.figures import figures
    from ..evaluation.loading import load_subject
    from ..signals.adapter_off import adapter_off

    sets, judges, _ = ready(asking["probes"], asking["judge"], [], None, asking["n"], asking["seed"], (None, None))
    subject = load_subject(model, **loading)
    sizes = {name: asking[name] for name in ("max_new_tokens", "batch_size")}
    failures: list[str] = []

    def answers(live: Any) -> list[Share]:
        return list(figures(live, subject.tokenizer, sets, judges, **sizes, failures=failures))

    if asking["merged"] and not subject.adapter:
        raise ConfigError(f"model {model!r} is no adapter, so there is nothing to add into a base: no --after-merge")
    base = None
    if with_base and subject.adapter:
        with adapter_off(subject.model):
            base = answers(subject.model)
    # Last: what is added into the weights cannot be put off any more.
    shares = answers(subject.model.merge_and_unload() if asking["merged"] else subject.model)
    for failure in dict.fromkeys(failures):
        say(f"note: {failure}", err=True)
    name = f"{model}, merged" if asking["merged"] else model
    return _Source(name, shares, subject.base if base else None, base)


def _conclude(source: _Source, limits: Any, as_json: bool, card: Path | None, junit: Path | None) -> None:
    """Decide, say so, write what was wanted, and end with the decision's code."""
    from ..evaluation.acceptance import decide, document_of
    from ..evaluation.figures_file import figure_rows
    from ..reports.acceptance import decision_card, decision_junit, decision_text

    decision = decide(source.figures, limits, source.base)
    if as_json:
        base = None if source.base is None else figure_rows(source.base)
        figures = {"figures": figure_rows(source.figures), "base_figures": base}
        say(json.dumps({**document_of(decision, limits, source.name, source.base_name), **figures}, indent=2))
    else:
        say(decision_text(decision, source.name))
    forms: list[tuple[Path | None, FileKind, Callable[[Decision, str], str]]]
    forms = [(card, _CARD, decision_card), (junit, _JUNIT, decision_junit)]
    for path, kind, form in forms:
        if path is not None:
            with new_output(path, "output", kind) as part:
                part.write_text(form(decision, source.name), encoding="utf-8")
    raise typer.Exit(decision.exit_code)
