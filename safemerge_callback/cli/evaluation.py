"""The verb that asks a model: harm, over-refusal and utility together."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..io.outputs import FileKind, new_output
from ..io.plain import json_text
from ..version import __version__
from .app import Verb, app, examples, note, show
from .options import device_named

if TYPE_CHECKING:
    from ..evaluation import Judge, Share, Transcript, Verdict
    from ..evaluation.prompts import PromptSet

_KEPT = ("set", "judge", "prompt", "response", "verdict")


@app.command(
    name="eval",
    cls=Verb,
    epilog=examples(
        "eval ADAPTER --probes harmbench,xstest --tasks gsm8k",
        "eval ADAPTER --probes harm:mine.csv,benign:own.csv -o figures.json",
    ),
)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="LoRA adapter or model: folder or Hub id, org/name[@revision].")
    ],
    base: Annotated[str | None, typer.Option(help="The adapter's base model; left out: what its config names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the base on the Hub.")] = None,
    probes: Annotated[
        str, typer.Option(help="Prompt sets with commas between: names, harm:FILE, benign:FILE; '' for none.")
    ] = "harmbench,xstest",
    judge: Annotated[
        list[str] | None,
        typer.Option(help="keywords, classifier:MODEL, llamaguard, ...; may be given again. [default: keywords]"),
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks with commas between, such as gsm8k,ifeval.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder with task files (YAML) of your own.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts of each set, chosen by --seed.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task at most. [default: all]")] = None,
    seed: Annotated[int, typer.Option(help="What chooses the prompts.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response that is judged.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a batch.")] = 16,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="JSON for the chat template, such as '{\"enable_thinking\": false}'.")
    ] = None,
    subspace: Annotated[Path | None, typer.Option("--subspace", "-s", help="Also measure the adapter's drift.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the figures.")] = None,
    responses: Annotated[
        Path | None, typer.Option(help="JSON-lines file for prompts and responses, which may be harmful.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="The model's dtype, or auto: as in its checkpoint.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to compute; left out: an accelerator, if any.")] = None,
) -> None:
    """Ask a model harmful and harmless prompts, and run tasks: harm, over-refusal and utility in one table."""
    from ..signals.chat import template_settings

    wanted = _names(tasks)
    asking = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "chat_template_kwargs": template_settings(chat_template_kwargs),
    }
    files = (output, responses)
    loading: dict[str, Any] = {"base": base, "revision": revision, "dtype": dtype_named(dtype)}
    where = None if device is None else device_named(device)
    sets, judges, manager = ready(_names(probes), judge or ["keywords"], wanted, task_folder, n, seed, files)
    plan = _Plan(sets, judges, wanted, asking, limit, manager, seed)
    drift = None if subspace is None else _drift(model, subspace)
    settings = {"model": model, **loading, "n": n, "seed": seed, "limit": limit, "tasks": wanted, **asking}
    report = _report(model, loading, where, plan, drift, settings)
    from ..evaluation.figures import FIGURES, RESPONSES

    _write(output, FIGURES, json_text(report.document) + "\n")
    _write(
        responses, RESPONSES, "".join(json.dumps(dict(zip(_KEPT, row, strict=True))) + "\n" for row in report.answers)
    )
    if report.failure:
        raise report.failure


@app.command(cls=Verb, epilog=examples("focal a.jsonl b.jsonl c.jsonl --set harmbench --count 2"))
def focal(
    responses: Annotated[
        list[Path], typer.Argument(metavar="RESPONSES", help="What `eval --responses` wrote of each adapter alone.")
    ],
    prompts: Annotated[str, typer.Option("--set", help="The set of harmful prompts that counts.")],
    judge: Annotated[str, typer.Option(help="The judge whose verdicts count.")] = "keywords",
    count: Annotated[int, typer.Option(min=1, help="How many adapters are to go together.")] = 2,
    diversity_share: Annotated[
        float, typer.Option(min=0, max=1, help="How much focal diversity counts against the vote's success.")
    ] = 0.5,
) -> None:
    """Choose among safety adapters those that fail at different prompts; no model is loaded."""
    from ..evaluation.focal import choose_by_responses

    chosen, outcomes = choose_by_responses(responses, count, diversity_share, prompts=prompts, judge=judge)
    lines: list[str] = []
    adapters: list[dict[str, Any]] = []
    for place, (file, text) in enumerate(zip(responses, outcomes, strict=True)):
        judged = len(text) - text.count("u")
        mark = "chosen" if place in chosen.members else ""
        lines.append(f"{file}: {text.count('1')} of {judged} refused {mark}".rstrip())
        counted = {"refused": text.count("1"), "judged": judged, "chosen": bool(mark)}
        adapters.append({"responses": file, **counted})
    lines.append(f"focal diversity {chosen.diversity:.3f}, vote {chosen.vote:.3f}, score {chosen.score:.3f}")
    setting = {"outcomes": outcomes, "count": count, "diversity_share": diversity_share}
    lines.append(f"focal: {json.dumps(setting)}")
    figures = {"diversity": chosen.diversity, "vote": chosen.vote, "score": chosen.score}
    show("\n".join(lines), {"adapters": adapters, **figures, "focal": setting})


@dataclass(frozen=True)
class _Plan:
    """What the model is asked, and how."""

    sets: Sequence[PromptSet]
    judges: Sequence[Judge]
    tasks: Sequence[str]
    asking: dict[str, Any]
    limit: int | None
    manager: Any
    seed: int


@dataclass
class _Report:
    """What came of it: for the JSON file, each response, and the error of tasks that could not be run."""

    document: dict[str, Any]
    answers: list[Any]
    failure: ConfigError | None = None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def ready(
    probes: Sequence[str],
    judge: Sequence[str],
    tasks: Sequence[str],
    folder: Path | None,
    n: int,
    seed: int,
    files: Sequence[Path | None],
) -> tuple[list[PromptSet], list[Judge], Any]:
    """Return prompt sets, judges and lm-eval's task manager: what can be refused is, before a model is loaded.

    The cheapest first. ConfigError as its parts.
    """
    from ..evaluation.figures import check_outputs, check_sets
    from ..evaluation.judges import check_judge, check_ready, load_judge
    from ..evaluation.prompts import load_prompt_sets, prompt_file

    if not probes and not tasks:
        raise ConfigError("there is nothing to evaluate: give --probes or --tasks")
    output, responses = files
    check_outputs(output, responses, [prompt_file(name) for name in probes])
    for name in judge:
        check_judge(name)
    manager = None
    if tasks:
        from ..evaluation.harness import check_tasks

        manager = check_tasks(tasks, folder)
    sets = load_prompt_sets(probes, n, seed)
    check_sets(sets)
    judges = [load_judge(name) for name in judge] if sets else []
    check_ready(judges)
    return sets, judges, manager


def dtype_named(name: str) -> Any:
    """Return the name of a dtype of torch's, or `auto`; ConfigError for any other."""
    import torch

    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ConfigError(f"dtype {name!r} is unknown: give auto, float32, bfloat16 or float16")
    return name


def _drift(adapter: str, subspace: Path) -> dict[str, Any]:
    from ..offline import measure_adapter

    readings = measure_adapter(adapter, subspace)
    cosines = [reading.cosine for reading in readings.values()]
    known = {"modules": len(cosines), "lowest": min(cosines), "mean": sum(cosines) / len(cosines)}
    return {"moved": readings.moved_mean, **known}


def _report(
    model: str, loading: dict[str, Any], device: str | None, plan: _Plan, drift: Any, settings: dict[str, Any]
) -> _Report:
    """Load, ask and print; what the prompts gave is kept when the tasks fail."""
    from ..decision import BAND
    from ..evaluation.figures import with_refusals
    from ..evaluation.figures_file import figure_rows, question_keys
    from ..evaluation.loading import load_subject
    from ..reports.table import figures_text, thoughts_lines

    began = time.perf_counter()
    subject = load_subject(model, **loading, device=device)
    answers: list[Any] = []
    failures: list[str] = []
    failure = None
    figures = _probe_figures(subject, plan, answers, failures)
    try:
        figures += _task_figures(subject, plan)
    except ConfigError as error:
        failure = error
    lines = [figures_text(figures, " on ".join(filter(None, (subject.adapter, subject.base))))]
    if drift:
        if drift["moved"] is not None:
            lines.append(f"drift: moved {drift['moved']:+z.2f} on average, {BAND.words(drift['moved'])}")
        counted = f"mean {drift['mean']:.3f} of {drift['modules']} modules"
        lines.append(f"drift: lowest cosine {drift['lowest']:.3f}, {counted}")
    document = {
        "adapter": subject.adapter,
        "base": subject.base,
        "figures": figure_rows(figures),
        **question_keys(subject.tokenizer, plan.sets, with_refusals(plan.judges)),
        "drift": drift,
        "failures": [*failures, *([str(failure)] if failure else [])],
        "seconds": round(time.perf_counter() - began, 1),
        "versions": installed_versions(),
    }
    document = {"settings": settings, **document}
    # At once: what is written next may fail.
    show("\n".join(lines), document)
    _notes(plan, [*thoughts_lines(figures), *failures])
    return _Report(document, answers, failure)


def _probe_figures(subject: Any, plan: _Plan, answers: list[Any], failures: list[str]) -> list[Any]:
    from ..evaluation.figures import figures

    def keep(one: Transcript, share: Share, verdicts: Sequence[Verdict]) -> None:
        rows = zip(one.prompts, one.responses, verdicts, strict=True)
        answers.extend((one.name, share["judge"], *row) for row in rows)

    if not plan.sets:
        return []
    return list(
        figures(subject.model, subject.tokenizer, plan.sets, plan.judges, **plan.asking, keep=keep, failures=failures)
    )


def _task_figures(subject: Any, plan: _Plan) -> list[Any]:
    from ..evaluation.harness import run_tasks

    if not plan.tasks:
        return []
    asking = {name: plan.asking[name] for name in ("batch_size", "chat_template_kwargs")}
    more: dict[str, Any] = {"limit": plan.limit, "seed": plan.seed, "manager": plan.manager}
    return list(run_tasks(subject.model, subject.tokenizer, plan.tasks, **asking, **more))


def _notes(plan: _Plan, failures: Sequence[str]) -> None:
    if not plan.tasks:
        note("note: utility is not measured; add --tasks, such as gsm8k")
    if not plan.sets:
        note("note: harm and over-refusal are not measured; add --probes")
    for failure in dict.fromkeys(failures):
        note(f"note: {failure}")


def installed_versions() -> dict[str, str]:
    """Return what made the figures, by distribution."""
    from ..record.entries import versions_of

    installed = versions_of("torch", "transformers", "peft", "lm-eval")
    return {"safemerge-callback": __version__, **{name: one for name, one in installed.items() if one is not None}}


def _write(path: Path | None, kind: FileKind, text: str) -> None:
    if path is None:
        return
    with new_output(path, "output", kind) as part:
        part.write_text(text, encoding="utf-8")
    note(f"{path}: written")
