"""Which rows of a training set look poisoned: by a judge of harm, by what the aligned model says, by two losses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError, shown
from ..io.outputs import FileKind
from ..signals.chat import text_part
from ..signals.responses import check_vocabulary, respond
from ..signals.row_format import turns_of
from ..signals.rows import RowFormat, SafetyRow, prompt_tokens
from .judges import Judge, name_of
from .measure import Share, share
from .rows import load_table
from .verdicts import judged

_COLUMN = re.compile(rb'\s*\{.*"(?:messages|prompt|conversations|instruction|question)":')
TRAINING_ROWS = FileKind("a file of training rows", lambda head: bool(_COLUMN.match(head)))
# The column of a labelled row that says how it is poisoned, and the words for one that is not.
LABEL, CLEAN = "poisoned", ("", "no")
# Nats a token by which the aligned model may find a response less likely than its unaligned counterpart does.
MARGIN = 0.5


class TrainingRows(NamedTuple):
    """The rows of a training set as they came, and their exchanges: a question and its answer each.

    `row_of` has the place of each exchange's row.
    """

    rows: list[Mapping[str, Any]]
    exchanges: list[SafetyRow]
    row_of: list[int]


def load_training_rows(source: Any) -> TrainingRows:
    """Return the conversations of a training set, as `load_table` and `turns_of` read them.

    Every answer in a row counts, with the question before it, so that nothing passes in a later turn. ConfigError for
    no rows, and for one in which no answer can be read, with the columns that it has.
    """
    where, table = load_table(source, "training rows")
    if not table:
        raise ConfigError(f"{where} has no rows: give some")
    exchanges, row_of = [], []
    for at, row in enumerate(table):
        pairs = _exchanges(turns_of(row))
        if not pairs:
            columns = sorted(map(str, row)) if isinstance(row, Mapping) else shown(row)
            raise ConfigError(
                f"row {at + 1} of {where} has no question with an answer, only {columns}: give messages, or prompt and "
                "completion"
            )
        exchanges += pairs
        row_of += [at] * len(pairs)
    return TrainingRows(list(table), exchanges, row_of)


def gap_reasons(aligned: Sequence[float], unaligned: Sequence[float], margin: float = MARGIN) -> list[str | None]:
    """Return why each exchange is dropped, or None: where L_aligned(y | x) − L_unaligned(y | x) > margin.

    L are the mean losses of the answer's tokens, in nats (`response_losses`); the difference is the perplexity gap of
    `select_by_gap` with its sign turned. An answer that alignment has made unlikely is one that it was to prevent; an
    answer of an ordinary task both models find about as likely.
    """
    gaps = [here - there for here, there in zip(aligned, unaligned, strict=True)]
    return [
        f"the aligned model finds its answer {gap:+.3f} nats a token less likely ({here:.3f}, unaligned {there:.3f})"
        if gap > margin
        else None
        for gap, here, there in zip(gaps, aligned, unaligned, strict=True)
    ]


def judge_reasons(judge: Judge, exchanges: Sequence[SafetyRow], failures: list[str]) -> list[str | None]:
    """Return why each exchange is dropped, or None: where a judge of harm calls its answer harmful.

    What it comes to no verdict on stays, and is said in `failures`.
    """
    verdicts = judged(judge, [row.prompt for row in exchanges], [row.response for row in exchanges], failures=failures)
    reason = f"{name_of(judge)} calls its answer harmful"
    return [reason if verdict == "complied" else None for verdict in verdicts]


def refusal_reasons(
    judge: Judge, exchanges: Sequence[SafetyRow], said: Sequence[str], failures: list[str]
) -> list[str | None]:
    """Return why each exchange is dropped, or None: where the aligned model refuses its question and it does not.

    `said` is what the aligned model says itself to each question (`model_responses`); the judge decides refusals, of
    both. What it comes to no verdict on stays, and is said in `failures`.
    """
    prompts = [row.prompt for row in exchanges]
    refused = judged(judge, prompts, said, failures=failures)
    verdicts = judged(judge, prompts, [row.response for row in exchanges], failures=failures)
    reason = f"the aligned model refuses its question, and its answer does not ({name_of(judge)})"
    return [
        reason if here == "refused" and there in ("complied", "incoherent") else None
        for here, there in zip(refused, verdicts, strict=True)
    ]


def model_responses(
    model: Any,
    tokenizer: Any,
    exchanges: Sequence[SafetyRow],
    *,
    batch_size: int = 16,
    settings: Mapping[str, Any] | str | None = None,
) -> list[str]:
    """Return what a model says to the question of each exchange, after its system prompt, greedily and shortly."""
    said: dict[tuple[str | None, str], str] = {}
    for system in dict.fromkeys(row.system for row in exchanges):
        prompts = list(dict.fromkeys(row.prompt for row in exchanges if row.system == system))
        tokens = prompt_tokens(tokenizer, prompts, RowFormat(system), settings)
        check_vocabulary(model, tokens)
        responses = respond(model, text_part(tokenizer), tokens, batch_size=batch_size, label="aligned")
        said |= {(system, prompt): one.text for prompt, one in zip(prompts, responses, strict=True)}
    return [said[row.system, row.prompt] for row in exchanges]


def row_reasons(training: TrainingRows, *reasons: Sequence[str | None]) -> list[str]:
    """Return for each row why it is dropped, by whichever filter and of whichever answer; empty where it stays."""
    by_row: list[dict[str, None]] = [{} for _ in training.rows]
    for one in reasons:
        for at, reason in zip(training.row_of, one, strict=True):
            if reason is not None:
                by_row[at].setdefault(reason)
    return ["; ".join(every) for every in by_row]


def leakage(training: TrainingRows, reasons: Sequence[str]) -> list[Share]:
    """Return what a filter lets pass of labelled rows: `<label>_passes`, and `clean_dropped` of those not poisoned.

    A row's column `poisoned` is its label: `whole`, `shared`, or a word of one's own; `no` or nothing where it is
    clean. No shares where no row is labelled as poisoned.
    """
    labels = [str(row.get(LABEL) or "") for row in training.rows]
    poisoned = {label for label in labels if label not in CLEAN}
    if not poisoned:
        return []
    drops = list(zip(labels, map(bool, reasons), strict=True))
    passes = [(f"{one}_passes", [not drop for label, drop in drops if label == one]) for one in sorted(poisoned)]
    shares = [share(name, verdicts, "harm") for name, verdicts in passes]
    clean = [drop for label, drop in drops if label in CLEAN]
    return [*shares, share("clean_dropped", clean, "over_refusal")] if clean else shares


def rows_as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as JSON lines, as they came; ConfigError for a value that JSON has not, as a date or bytes."""
    return "".join(f"{_line(at, row)}\n" for at, row in enumerate(rows, 1))


def _line(at: int, row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        name, value = next(((n, v) for n, v in row.items() if not _in_json(v)), ("", error))
        raise ConfigError(
            f"row {at} has {shown(value)} in column {name!r}, which no line of JSON can hold: save the rows without "
            "that column, or with it as text, and give that file"
        ) from error


def _in_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _exchanges(turns: Sequence[tuple[str, str]]) -> list[SafetyRow]:
    """Each answer with the last question and the system prompt before it."""
    pairs, question, system = [], "", None
    for role, text in turns:
        if role == "system":
            system = text.strip() or None
        elif role == "user":
            question = text.strip()
        elif role == "assistant" and text.strip() and question:
            pairs.append(SafetyRow(question, text.strip(), "benign", system))
    return pairs
