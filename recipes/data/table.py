"""Training rows of one's own: a file, or a data set of the Hub, in the columns that TRL knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safemerge_callback.errors import ConfigError, nearest, shown
from safemerge_callback.evaluation.rows import load_table
from safemerge_callback.io.paths import existing
from safemerge_callback.io.texts import check_whole
from safemerge_callback.signals.row_format import turns_of

COLUMNS = (
    "messages, a list of turns with role and content, the last one the assistant's; or prompt and completion, each as "
    "text or as turns (question and answer, instruction and output do, too)"
)
ROLES = ("system", "user", "assistant")
Rows = list[dict[str, Any]]


class RowForm(NamedTuple):
    """What a recipe is trained on, and how it is had.

    `names`: the recipes' own data that have it; `by_name`: its rows of one of them and a split; `of_row`: of a row of a
    table, whose columns are `columns`, and of what the row is called in a message.
    """

    names: Collection[str]
    by_name: Callable[[str, str], Rows]
    of_row: Callable[[Any, str], dict[str, Any]]
    columns: str


def is_table(source: str) -> bool:
    """Whether `source` is a path or an id of the Hub: a name of the recipes' data has neither a slash nor an ending."""
    return "/" in source or bool(Path(source).suffix)


def rows_in_form(form: RowForm, source: str, split: str = "train") -> Rows:
    """Return the rows of a split: of the recipes' own data by name, or of a file or data set of the Hub.

    ConfigError for a name that is none, and as `table_rows`.
    """
    name = source.partition(":")[0]
    if name in form.names:
        return form.by_name(source, split)
    if is_table(source):
        return table_rows(form, source, split)
    rows = "or give rows of your own, a file (.jsonl, .csv, .json) or the id of a data set on the Hub, org/name"
    raise ConfigError(
        f"data {name!r} is unknown: choose one of {sorted(form.names)}{nearest(name, form.names, then=rows)}"
    )


def table_rows(form: RowForm, source: str, split: str = "train") -> Rows:
    """Return the rows of a file (.jsonl, .csv, .json) or of `org/name[@revision]` on the Hub, in a form.

    `split` is the Hub's. ConfigError for a source that cannot be read, a split of a file, no rows, and for a row that
    is not of the form, with the columns that it has.
    """
    if split != "train" and existing(source) is not None:
        raise ConfigError(f"data {shown(source)} is a file, which has no split {split!r}: leave data_split out")
    where, table = load_table(source, "data", split)
    return formed(form, table, where)


def formed(form: RowForm, table: Sequence[Any], where: str) -> Rows:
    """Return the rows of a table in a form; ConfigError where there are none, or one is not of it."""
    if not table:
        raise ConfigError(f"{where} has no rows: give at least one, with {form.columns}")
    return [form.of_row(row, f"row {at} of {where}") for at, row in enumerate(table, 1)]


def example_of(row: Any, where: str) -> dict[str, Any]:
    """Return a row as a conversation: the last answer is its completion, what stands before it the prompt.

    A text is a turn of the chat. ConfigError, with the columns that it has, for a row with no question and answer.
    """
    turns = turns_of(row)
    if not answered(turns):
        raise ConfigError(f"{where} has no question with an answer in {columns_of(row)}. Give {COLUMNS}")
    return conversation_of(turns, where)


def answered(turns: Sequence[tuple[str, str]]) -> bool:
    """Whether turns, each a role and a text, end in an answer to something."""
    return len(turns) >= 2 and turns[-1][0] == "assistant"


def conversation_of(turns: Sequence[tuple[str, str]], where: str) -> dict[str, Any]:
    """Return turns that end in an answer as a prompt and its completion; ConfigError for a turn that cannot be one."""
    for number, (role, text) in enumerate(turns, 1):
        if role not in ROLES:
            raise ConfigError(f"{where}: turn {number} has the role {shown(role)}: a recipe knows {', '.join(ROLES)}")
        if not text.strip():
            raise ConfigError(f"{where}: turn {number}, the {role}'s, has no text: write it, or leave the row out")
        check_whole(text, f"{where}: turn {number}")
    *before, answer = ({"role": role, "content": text} for role, text in turns)
    return {"prompt": before, "completion": [answer]}


def columns_of(row: Any) -> str:
    """Return, for a message, which columns a row has, and which of them are empty."""
    if not isinstance(row, Mapping):
        return shown(row)
    empty = sorted(str(name) for name, value in row.items() if not value)
    more = f", of which {empty} are empty" if empty else ""
    return f"its columns {sorted(map(str, row))}{more}"
