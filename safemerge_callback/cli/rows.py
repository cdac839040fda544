"""The verbs on safety rows: harvest them of a model, and select which of them to mix in."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import ConfigError, shown
from ..io.choices import one_of
from ..io.outputs import FileKind, free_output, new_output
from .app import Verb, app, examples, note, show
from .options import device_named, refuse_idle
from .row_models import Opening, losses_of, states_of

if TYPE_CHECKING:
    from ..evaluation.measure import Share
    from ..evaluation.selection import Chosen
    from ..signals.rows import SafetyRow

_Rows = Annotated[
    str, typer.Argument(metavar="ROWS", help="Safety rows, or training rows (--drop): a file or a Hub id.")
]
_Aligned = Annotated[str | None, typer.Option(help="The aligned model: folder or Hub id.")]
_Unaligned = Annotated[
    str | None, typer.Option(help="Its unaligned counterpart, or a fine-tuned adapter of it. Of --by gap and --drop.")
]
_Data = Annotated[str | None, typer.Option(help="The task's training rows: a file or Hub id. Of --by dpp and --share.")]
_By = Annotated[str, typer.Option(help="gap: perplexity gap of the two models; dpp: relevance and diversity.")]
_Margin = Annotated[
    float, typer.Option(help="Nats a token by which the aligned model may find an answer less likely (--drop).")
]
_Judge = Annotated[
    str | None, typer.Option(help="Of harm, for the answers, or of refusals, for --aligned's own, too (--drop).")
]
_Decides = Annotated[str | None, typer.Option(help="harm or refusal, of a --judge that can decide either (--drop).")]
_Dropped = Annotated[Path | None, typer.Option(help="File for dropped rows, each with its reason (--drop).")]
_Output = Annotated[Path, typer.Option("--output", "-o", help="JSON-lines file for the rows, which may be harmful.")]
_Dtype = Annotated[str, typer.Option(help="The model's dtype, or auto: as in its checkpoint.")]
_Device = Annotated[str | None, typer.Option(help="Where to compute; left out: an accelerator, if any.")]
_Kwargs = Annotated[
    str | None, typer.Option(help="JSON for the chat template, such as '{\"enable_thinking\": false}'.")
]


@app.command(
    cls=Verb,
    epilog=examples(
        "harvest meta-llama/Llama-3.1-8B-Instruct -o rows.jsonl",
        "harvest MODEL --prompts harm:mine.csv,benign:own.csv --judge wildguard -o rows.jsonl",
    ),
)
def harvest(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The aligned model, or an adapter: folder or Hub id.")],
    output: _Output,
    prompts: Annotated[
        str | None,
        typer.Option(help="Sets with commas between: names, harm:FILE, benign:FILE. [default: this package's two]"),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Prompts of each set, by --seed. [default: all]")] = None,
    seed: Annotated[int, typer.Option(help="What chooses the prompts.")] = 0,
    judge: Annotated[str, typer.Option(help="keywords, classifier:MODEL, llamaguard, ...")] = "keywords",
    system: Annotated[str | None, typer.Option(help="A system prompt before every prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="A response that has not ended by then is left out.")
    ] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a batch.")] = 16,
    chat_template_kwargs: _Kwargs = None,
    dtype: _Dtype = "auto",
    device: _Device = None,
) -> None:
    """Write a model's own refusals of harmful prompts and answers to harmless ones as rows, to mix in or to replay."""
    from ..evaluation.harvest import check_prompt_sets
    from ..evaluation.harvest import harvest as harvested
    from ..evaluation.judges import check_judge, check_ready, load_judge
    from ..evaluation.loading import load_subject
    from ..evaluation.prompts import PACKAGED, load_prompt_sets, prompt_file
    from ..evaluation.rows import ROWS_FILE, rows_text
    from ..signals.chat import template_settings
    from ..signals.rows import RowFormat

    names = list(PACKAGED) if prompts is None else [part.strip() for part in prompts.split(",") if part.strip()]
    free_output(output, "output", ROWS_FILE, [prompt_file(name) for name in names])
    check_judge(judge)
    settings = template_settings(chat_template_kwargs)
    where = None if device is None else device_named(device)
    sets = load_prompt_sets(names, n, seed)
    check_prompt_sets(sets)
    judges = load_judge(judge)
    check_ready([judges])
    subject = load_subject(model, dtype=dtype, device=where)
    rows = harvested(
        subject.model,
        subject.tokenizer,
        sets,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        judge=judges,
        row_format=RowFormat(system),
        chat_template_kwargs=settings,
        whole=True,
    )
    _write(output, rows_text(rows.rows), ROWS_FILE)
    kept = {kind: {**counts._asdict(), "kept": rows.kept(kind)} for kind, counts in rows.counts.items()}
    show(str(rows), {"output": output, "kinds": kept, "unended": rows.unended, "failures": rows.failures})
    for failure in rows.failures:
        note(f"note: {failure}")


@app.command(
    cls=Verb,
    epilog=examples(
        "select rows.jsonl --aligned MODEL --unaligned BASE --data train.jsonl -o chosen.jsonl",
        "select rows.jsonl --aligned MODEL --data train.jsonl --by dpp --n 60 -o chosen.jsonl",
        "select train.jsonl --drop --judge keywords --aligned MODEL -o kept.jsonl --dropped dropped.jsonl",
        "select train.jsonl --drop --judge llamaguard -o kept.jsonl",
    ),
)
def select(
    context: typer.Context,
    rows: _Rows,
    output: _Output,
    aligned: _Aligned = None,
    unaligned: _Unaligned = None,
    data: _Data = None,
    by: _By = "gap",
    n: Annotated[int | None, typer.Option("--n", min=1, help="Rows to choose. [default: by --share]")] = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Rows to choose for each row of --data.")] = 0.03,
    power: Annotated[float, typer.Option(min=0.0, help="How much relevance counts against diversity (dpp).")] = 4.0,
    limit: Annotated[int, typer.Option(min=1, help="Rows of --data that are read at most (dpp), by --seed.")] = 2000,
    seed: Annotated[int, typer.Option(help="What chooses the rows of --data.")] = 0,
    drop: Annotated[
        bool, typer.Option("--drop", help="Filter training rows: keep what does not look poisoned.")
    ] = False,
    margin: _Margin = 0.5,
    judge: _Judge = None,
    decides: _Decides = None,
    dropped: _Dropped = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a batch.")] = 8,
    chat_template_kwargs: _Kwargs = None,
    dtype: _Dtype = "auto",
    device: _Device = None,
) -> None:
    """Choose the safety rows that are worth most, or drop training rows that look poisoned; each with its reason."""
    from ..evaluation.rows import ROWS_FILE, load_rows, load_table
    from ..evaluation.selection import chosen_text
    from ..signals.chat import template_settings

    settings = template_settings(chat_template_kwargs)
    opening = Opening(dtype, None if device is None else device_named(device), batch_size, settings)
    if drop:
        refuse_idle(context, "--drop", _OF_CHOICE)
        refuse_idle(context, "--drop without --unaligned", () if unaligned else ["margin"])
        refuse_idle(context, "--drop without --aligned", () if aligned else _OF_MODELS)
        _drop(_Filter(rows, aligned, unaligned, margin, judge, decides), output, dropped, opening)
        return
    refuse_idle(context, "select without --drop", _OF_DROP)
    rule = _RULES[one_of(by, _RULES, "--by")]
    refuse_idle(context, f"--by {by}", rule.idle)
    refuse_idle(context, f"--by {by} with --n", () if n is None else {"share", "data"} - {rule.needs})
    for name, value in {"aligned": aligned, rule.needs: {"unaligned": unaligned, "data": data}[rule.needs]}.items():
        if value is None:
            raise ConfigError(f"--by {by} needs --{name}: give it")
    if n is None and data is None:
        raise ConfigError("how many rows to choose is not said: give --n, or --data, of whose rows --share is counted")
    free_output(output, "output", ROWS_FILE, [source for source in (rows, data) if source is not None])
    table = load_rows(rows, both=False)
    task = [] if data is None else load_table(data, "training rows")[1]
    count = n if n is not None else max(1, round(share * len(task)))
    some = random.Random(seed).sample(task, min(limit, len(task)))
    chosen = rule.choose(_Question(table, some, str(aligned), unaligned, count, power), opening)
    _write(output, chosen_text(chosen), ROWS_FILE)
    counts = _counts(chosen, table, count, by)
    show(_summary(counts), {"output": output, **counts})
    if len({row.kind for row in table}) > len(counts["kinds"]):
        note("note: they are all of one kind, and replay refuses such rows: raise --n or --share")


class _Question(NamedTuple):
    """What is chosen from, for which task, by which models, how many."""

    rows: Sequence[SafetyRow]
    task: Sequence[Any]
    aligned: str
    unaligned: str | None
    number: int
    power: float


def _by_gap(question: _Question, opening: Opening) -> list[Chosen]:
    from ..evaluation.selection import select_by_gap

    losses = losses_of(question.rows, question.aligned, str(question.unaligned), opening)
    return select_by_gap(question.rows, *losses, question.number)


def _by_dpp(question: _Question, opening: Opening) -> list[Chosen]:
    from ..evaluation.selection import select_by_dpp

    states = states_of(question.rows, question.task, question.aligned, opening)
    return select_by_dpp(question.rows, *states, question.number, question.power)


class _Rule(NamedTuple):
    """A way to choose, the option without which it cannot, and those that have no effect on it."""

    choose: Callable[[_Question, Opening], list[Chosen]]
    needs: str
    idle: tuple[str, ...]


_RULES = {
    "gap": _Rule(_by_gap, "unaligned", ("power", "limit", "seed")),
    "dpp": _Rule(_by_dpp, "data", ("unaligned",)),
}
# The options of a choice alone, those of --drop alone, and how a model is opened.
_OF_CHOICE = ("data", "by", "n", "share", "power", "limit", "seed")
_OF_DROP = ("judge", "decides", "dropped", "margin")
_OF_MODELS = ("batch_size", "chat_template_kwargs", "dtype", "device")


def _counts(chosen: Sequence[Chosen], rows: Sequence[SafetyRow], count: int, by: str) -> dict[str, Any]:
    scores, kinds = [one.score for one in chosen], Counter(one.row.kind for one in chosen)
    counts = {"rows": len(rows), "chosen": len(chosen), "wanted": count, "by": by, "kinds": kinds}
    return {**counts, "lowest_score": min(scores), "highest_score": max(scores)}


def _summary(counts: dict[str, Any]) -> str:
    kinds, few = counts["kinds"], counts["chosen"] != counts["wanted"]
    parts = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds, reverse=True))
    fewer = f" ({counts['wanted']} were asked for)" if few else ""
    span = f"scores {counts['lowest_score']:+.3f} to {counts['highest_score']:+.3f}"
    return f"chose {counts['chosen']} of {counts['rows']} rows by {counts['by']}{fewer}: {parts}; {span}"


class _Filter(NamedTuple):
    """Which rows are filtered, and by what: a judge, two models' losses, or both."""

    rows: str
    aligned: str | None
    unaligned: str | None
    margin: float
    judge: str | None
    decides: str | None

    def check(self) -> None:
        """Raise ConfigError where nothing could be filtered, or a model is missing."""
        if self.judge is None and self.unaligned is None:
            raise ConfigError("--drop needs --judge, or --aligned and --unaligned for the perplexity gap, or all three")
        if self.unaligned is not None and self.aligned is None:
            raise ConfigError("--unaligned is one of two models: give --aligned, too")
        if self.decides is not None and self.judge is None:
            raise ConfigError("--decides is what a judge decides: give --judge, or drop it")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"--margin is {self.margin}: give 0 or more nats a token")
        if self.judge is not None:
            self._check_judge(self.judge)

    def _check_judge(self, judge: str) -> None:
        from ..evaluation.judges import decided_by

        if decided_by(judge, self.decides) == "harm":
            if self.aligned is not None and self.unaligned is None:
                raise ConfigError(f"--aligned has no effect on --drop by {judge!r}, a judge of harm: drop it")
        elif self.aligned is None:
            raise ConfigError(
                f"judge {judge!r} decides refusals, which are compared with the aligned model's own: give --aligned, "
                "or a judge of harm (--decides harm, if it can)"
            )


def _drop(what: _Filter, output: Path, dropped: Path | None, opening: Opening) -> None:
    """Write the training rows that do not look poisoned, and those that do, and say what passed."""
    from ..evaluation.measure import ROW_COLUMNS, columns
    from ..evaluation.row_filter import TRAINING_ROWS, leakage, load_training_rows, row_reasons, rows_as_lines

    what.check()
    free_output(output, "output", TRAINING_ROWS, [what.rows])
    if dropped is not None:
        free_output(dropped, "dropped", TRAINING_ROWS, [what.rows])
        if output.resolve() == dropped.resolve():
            raise ConfigError(f"--output and --dropped are both {shown(output)}: give two files")
    training = load_training_rows(what.rows)
    # What cannot be written is refused before a model is asked.
    rows_as_lines(training.rows)
    failures: list[str] = []
    reasons = row_reasons(training, *_reasons(what, training.exchanges, failures, opening))
    kept = [row for row, reason in zip(training.rows, reasons, strict=True) if not reason]
    if not kept:
        raise ConfigError(f"all {len(reasons)} rows look poisoned, row 1 since {reasons[0]}: nothing is written")
    _write(output, rows_as_lines(kept), TRAINING_ROWS)
    if dropped is not None:
        lines = [{**row, "reason": reason} for row, reason in zip(training.rows, reasons, strict=True) if reason]
        _write(dropped, rows_as_lines(lines), TRAINING_ROWS)
    shares = leakage(training, reasons)
    counts = {"rows": len(reasons), "kept": len(kept), "failures": failures}
    text = "\n".join([f"kept {len(kept)} of {len(reasons)} rows", *_leakage_lines(shares)])
    show(
        text, {"output": output, "dropped": dropped, **counts, "leakage": [columns(one, ROW_COLUMNS) for one in shares]}
    )
    for failure in failures:
        note(f"note: {failure}")


def _reasons(
    what: _Filter, exchanges: Sequence[SafetyRow], failures: list[str], opening: Opening
) -> Iterator[list[str | None]]:
    from ..evaluation.judges import check_ready, decides, load_judge
    from ..evaluation.row_filter import gap_reasons, judge_reasons, refusal_reasons

    if what.judge is not None:
        judge = load_judge({"name": what.judge, "decides": what.decides} if what.decides else what.judge)
        check_ready([judge])
        if decides(judge) == "harm":
            yield judge_reasons(judge, exchanges, failures)
        else:
            said = _responses(exchanges, str(what.aligned), opening)
            yield refusal_reasons(judge, exchanges, said, failures)
    if what.aligned is not None and what.unaligned is not None:
        yield gap_reasons(*losses_of(exchanges, what.aligned, what.unaligned, opening), what.margin)


def _responses(exchanges: Sequence[SafetyRow], aligned: str, opening: Opening) -> list[str]:
    """What the aligned model itself says to each question."""
    from ..evaluation.loading import load_subject
    from ..evaluation.row_filter import model_responses

    subject = load_subject(aligned, dtype=opening.dtype, device=opening.device)
    how: dict[str, Any] = {"batch_size": opening.batch_size, "settings": opening.chat_template_kwargs}
    return model_responses(subject.model, subject.tokenizer, exchanges, **how)


def _leakage_lines(shares: Sequence[Share]) -> list[str]:
    if not shares:
        return ["leakage: not known, since no row is labelled as poisoned in a column `poisoned`"]
    return [
        f"leakage: {one['measure']} {one['value']:.1%} of {one['n']} ({one['low']:.1%} to {one['high']:.1%})"
        for one in shares
    ]


def _write(path: Path, text: str, kind: FileKind) -> None:
    with new_output(path, "output", kind) as part:
        part.write_text(text, encoding="utf-8")
    note(f"{path}: written")
