"""Safety rows in the columns of a training set; apart from who mixes them, since columns are known here alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..signals.row_format import PAIRS, format_of
from ..signals.rows import PLAIN, RowFormat, SafetyRow

Writer = Callable[[SafetyRow], Mapping[str, Any]]
_WHOLE = ("messages", "conversations")
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def row_writer(rows: Sequence[Mapping[str, Any]], *, in_format: bool = False) -> Writer:
    """Return what writes a safety row with the columns that the first `rows` of a training set have.

    The columns are `messages` or `conversations` (ShareGPT's names where the set has them), or a question and its
    answer, each as text or as turns. A further column takes the value that all of `rows` share, else None. With
    `in_format` a row stands in the set's own system prompt and wrapper (`format_of`). ConfigError for other columns.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    row_format = (format_of(rows) or PLAIN) if in_format else PLAIN
    whole = next((name for name in _WHOLE if _are_turns(rows, name)), None)
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    if "rejected" in names or (whole is None and pair is None):
        raise ConfigError(
            f"the training set has the columns {names}, in which a refusal or an answer cannot be written: give a set "
            f"with messages, or with prompt and completion, before it is tokenized, or `columns`, a function of a row "
            "that returns these columns"
        )
    taken = {whole} if whole is not None else set(pair or ())
    shared = {name: _shared_value(rows, name) for name in names if name not in taken}
    if whole is not None:
        return lambda row: {**shared, whole: _turns(row, row_format, sharegpt=_is_sharegpt(rows, whole))}
    asks, answers = pair or ("", "")
    as_turns = [_are_turns(rows, name) for name in (asks, answers)]
    if "input" in shared:
        shared["input"] = ""
    return lambda row: {
        **shared,
        asks: _turns(row, row_format)[:-1] if as_turns[0] else _text(row, row_format),
        answers: _turns(row, row_format)[-1:] if as_turns[1] else row.response,
    }


def _turns(row: SafetyRow, row_format: RowFormat, *, sharegpt: bool = False) -> list[dict[str, str]]:
    system = row.system or row_format.system
    said = [("system", system)] if system else []
    said += [("user", row_format.wrapped(row.prompt)), ("assistant", row.response)]
    if sharegpt:
        return [{"from": _SHAREGPT[role], "value": text} for role, text in said]
    return [{"role": role, "content": text} for role, text in said]


def _text(row: SafetyRow, row_format: RowFormat) -> str:
    """A question without turns: a system prompt stands before it."""
    prompt = row_format.wrapped(row.prompt)
    return f"{row.system}\n\n{prompt}" if row.system else prompt


def _are_turns(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows]
    return any(isinstance(value, Sequence) and value and isinstance(value[0], Mapping) for value in values)


def _is_sharegpt(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any("from" in turn for row in rows for turn in row.get(name) or ())


def _shared_value(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    values = [row.get(name) for row in rows]
    return values[0] if all(value == values[0] for value in values) else None
