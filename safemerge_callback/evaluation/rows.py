"""Safety rows of one's own: a list, a file, or a data set of the Hub, with a prompt and the response to keep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..errors import ConfigError, nearest, shown
from ..io.addresses import address_of
from ..io.outputs import FileKind
from ..io.paths import existing
from ..io.texts import check_whole
from ..signals.rows import KINDS, Kind, SafetyRow
from .judges import KeywordJudge
from .prompts.tables import ENDINGS, read_rows

COLUMNS = ("prompt", "response", "kind", "system")
_TABLES = tuple(ending for ending in ENDINGS if ending != ".txt")
ROWS_FILE = FileKind("a file of safety rows", lambda head: head.lstrip().startswith(b'{"prompt"'))


def load_rows(source: Any, *, split: str = "train", both: bool = True) -> tuple[SafetyRow, ...]:
    """Return safety rows in their order.

    `source` is a list of `SafetyRow` or of mappings (a data set, too), a file (.jsonl, .csv, .json), or the id of a
    data set on the Hub, `org/name[@revision]`, of which `split` is read with the library `datasets`. A row has the
    columns `prompt` and `response`, and may have `kind` ("harm": a safe model refuses; "benign": it answers) and
    `system`; without a kind it is harm where keywords see a refusal in the response. Raises ConfigError, with the row,
    for a column that is missing, a value that is empty or no text and a kind that is none; for no rows at all; with
    `both`, for rows of one kind alone; and for a source that cannot be read.
    """
    where, table = load_table(source, "safety rows", split)
    if not table:
        raise ConfigError(f"{where} has no rows: give {'at least one refusal and one answer' if both else 'some'}")
    judge = KeywordJudge()
    rows = tuple(_row(row, judge, f"row {at} of {where}") for at, row in enumerate(table, 1))
    if both:
        check_both_kinds(rows, where)
    return rows


def check_both_kinds(rows: Iterable[SafetyRow], where: str) -> None:
    """Raise ConfigError for rows of one kind alone."""
    counts = Counter(row.kind for row in rows)
    for kind, lack in zip(KINDS, ("refusal of a harmful", "answer to a harmless"), strict=True):
        if not counts[kind]:
            raise ConfigError(
                f"{where}: all {counts.total()} rows are of one kind, with no {lack} prompt (kind {kind!r}): rows of "
                "one kind alone teach a model to refuse all or nothing. Add some of the other"
            )


def columns_of(row: SafetyRow) -> dict[str, str]:
    """Return a row as `load_rows` takes it; `system` only where there is one."""
    return {name: getattr(row, name) for name in COLUMNS if getattr(row, name) is not None}


def rows_text(rows: Iterable[SafetyRow]) -> str:
    """Return rows as JSON lines that `load_rows` reads."""
    return "".join(f"{json.dumps(columns_of(row), ensure_ascii=False)}\n" for row in rows)


def load_table(source: Any, what: str, split: str = "train") -> tuple[str, Sequence[Any]]:
    """Return what a source is called in a sentence, and its rows, whatever they hold.

    `source` is a list or a data set, a file (.jsonl, .csv, .json), or the id of a data set on the Hub, of which `split`
    is read; `what` is what its rows are called. ConfigError where it is none, or cannot be read.
    """
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
            raise ConfigError(
                f"{what} are {shown(source)}: give a list of rows, a file ({', '.join(_TABLES)}), or the id of a data "
                "set on the Hub"
            )
        return f"the {what}", list(source)
    who = f"{what} {shown(str(source))}"
    if Path(source).suffix.lower() in _TABLES and existing(source) is None:
        raise ConfigError(f"{who}: there is no such file")
    address = address_of(source, who, error=ConfigError, kind="file")
    if address.path is None:
        return who, _hub_rows(address.repo, address.revision, split, who)
    if address.path.suffix.lower() not in _TABLES:
        raise ConfigError(f"{who}: give a file that ends in {', '.join(_TABLES)}")
    return who, read_rows(address.path, what=what)


def _hub_rows(repo: str, revision: str | None, split: str, what: str) -> Sequence[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"{what} needs datasets: pip install 'safemerge-callback[recipes]'") from None
    # Whatever the library raises: its errors have no common kind.
    try:
        return list(load_dataset(repo, revision=revision, split=split))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{what} cannot be had from the Hub ({type(error).__name__}: {reason}): check its name and its split "
            f"{split!r}, log in with `hf auth login` if it is gated, or give a file"
        ) from error


def _row(row: Any, judge: KeywordJudge, where: str) -> SafetyRow:
    if isinstance(row, SafetyRow):
        row = {name: getattr(row, name) for name in COLUMNS}
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is {shown(row)}: give a mapping with prompt and response")
    prompt, response = (_text(row, name, where) for name in ("prompt", "response"))
    system = _text(row, "system", where) if row.get("system") not in (None, "") else None
    kind = row.get("kind")
    if kind is None or kind == "":
        kind = "harm" if judge.refuses(prompt, response) else "benign"
    return SafetyRow(prompt, response, _kind(kind, where), system)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise ConfigError(f"{where} has no column {name!r}, only {sorted(map(str, row))}{nearest(name, map(str, row))}")
    value = row[name]
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} is {shown(value)}, not text")
    if not value.strip():
        raise ConfigError(f"{where}: {name} is empty: give a text, or leave the row out")
    return check_whole(value.strip(), f"{where}: {name}")


def _kind(kind: Any, where: str) -> Kind:
    if kind not in KINDS:
        raise ConfigError(
            f"{where}: kind is {shown(kind)}: write harm for a prompt that a safe model refuses, benign for one that "
            "it answers"
        )
    return cast(Kind, kind)
