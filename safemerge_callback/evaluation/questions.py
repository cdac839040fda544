"""Rows to ask a merged model about: a training set's own, or prompts, whose responses may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, shown
from ..signals.row_format import turns_of
from ..signals.rows import KINDS, Kind, SafetyRow
from .judges import KeywordJudge
from .rows import load_table


def load_questions(source: Any, what: str, kind: Kind | None = None) -> tuple[SafetyRow, ...]:
    """Return rows in their order, each a prompt and its response, which is empty where the row has none.

    `source`: as `load_table`; a row is a conversation (`turns_of`), of which the first question and its answer count,
    or has a text in `prompt`. `what` is what the rows are called. `kind`: what all are; None: what a row says in
    `kind`, else harm where there is no response or keywords see a refusal in it. ConfigError for no rows, with the row
    for one that can be read as none of these, and for a source that cannot be read.
    """
    where, table = load_table(source, what)
    if not table:
        raise ConfigError(f"{where} has no rows: give some")
    judge = KeywordJudge()
    return tuple(_question(row, kind, judge, f"row {at} of {where}") for at, row in enumerate(table, 1))


def _question(row: Any, kind: Kind | None, judge: KeywordJudge, where: str) -> SafetyRow:
    turns = [(role, text.strip()) for role, text in turns_of(row)]
    if not turns and isinstance(row, Mapping) and isinstance(row.get("prompt"), str):
        turns = [("user", row["prompt"].strip())]
    asks = next((place for place, (role, text) in enumerate(turns) if role == "user" and text), None)
    if asks is None:
        raise ConfigError(
            f"{where} is {shown(row)}: give a conversation in messages, a question and its answer in prompt and "
            "completion or response, or a prompt alone"
        )
    prompt = turns[asks][1]
    response = next((text for role, text in turns[asks + 1 :] if role == "assistant"), "")
    system = next((text for role, text in turns[:asks] if role == "system" and text), None) or _system(row)
    return SafetyRow(prompt, response, kind or _kind(row, prompt, response, judge), system)


def _system(row: Any) -> str | None:
    value = row.get("system")
    return value.strip() if isinstance(value, str) and value.strip() else None


def _kind(row: Any, prompt: str, response: str, judge: KeywordJudge) -> Kind:
    for kind in KINDS:
        if row.get("kind") == kind:
            return kind
    return "harm" if not response or judge.refuses(prompt, response) else "benign"
