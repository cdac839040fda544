"""Training rows of one's own: a file, or a data set of the Hub, in the columns that TRL knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_callback.errors import ConfigError, shown
from safemerge_callback.evaluation.rows import load_table
from safemerge_callback.io.paths import existing
from safemerge_callback.io.texts import check_whole
from safemerge_callback.signals.row_format import turns_of

FORMS = (
    "messages, a list of turns with role and content, the last one the assistant's; or prompt and completion, each as "
    "text or as turns (question and answer, instruction and output do, too)"
)
ROLES = ("system", "user", "assistant")


def is_table(source: str) -> bool:
    """Whether `source` is a path or an id of the Hub: a name of the recipes' data has neither a slash nor an ending."""
    return "/" in source or bool(Path(source).suffix)


def table_examples(source: str, split: str = "train") -> list[dict[str, Any]]:
    """Return the rows of a file (.jsonl, .csv, .json) or of `org/name[@revision]` on the Hub, as conversations.

    A row's last answer is its completion, what stands before it the prompt; a text is a turn of the chat. `split` is
    the Hub's. ConfigError for a source that cannot be read, a split of a file, no rows, and for a row that holds no
    question with its answer, with the columns that it has.
    """
    if split != "train" and existing(source) is not None:
        raise ConfigError(f"data {shown(source)} is a file, which has no split {split!r}: leave data_split out")
    where, table = load_table(source, "data", split)
    if not table:
        raise ConfigError(f"{where} has no rows: give at least one, with {FORMS}")
    return [_example(row, f"row {at} of {where}") for at, row in enumerate(table, 1)]


def _example(row: Any, where: str) -> dict[str, Any]:
    turns = turns_of(row)
    if len(turns) < 2 or turns[-1][0] != "assistant":
        raise ConfigError(f"{where} {_lack(row)}. Give {FORMS}")
    for number, (role, text) in enumerate(turns, 1):
        if role not in ROLES:
            raise ConfigError(f"{where}: turn {number} has the role {shown(role)}: a recipe knows {', '.join(ROLES)}")
        if not text.strip():
            raise ConfigError(f"{where}: turn {number}, the {role}'s, has no text: write it, or leave the row out")
        check_whole(text, f"{where}: turn {number}")
    *before, answer = ({"role": role, "content": text} for role, text in turns)
    return {"prompt": before, "completion": [answer]}


def _lack(row: Any) -> str:
    """What a row has in place of a question with its answer."""
    if not isinstance(row, Mapping):
        return f"is {shown(row)}"
    empty = sorted(str(name) for name, value in row.items() if not value)
    more = f", of which {empty} are empty" if empty else ""
    return f"has no question with an answer in its columns {sorted(map(str, row))}{more}"
