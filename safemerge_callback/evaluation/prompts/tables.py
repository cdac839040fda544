"""Rows of CSV, JSON, JSON-lines, YAML seed and parquet files, as dicts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...io.documents import UNREADABLE, read_json, read_text, read_yaml
from ...io.texts import check_whole

ENDINGS = (".csv", ".jsonl", ".json", ".txt")
# Columns that hold the prompt in the sets that people share, the most telling first.
KNOWN = ("prompt", "instruction", "question", "goal", "behavior", "forbidden_prompt", "query", "request", "text")
_NO_HEADER = "first field"


def read_rows(path: Path, *, header: bool = True, what: str = "prompt file") -> list[dict[str, Any]]:
    """Return the rows of a file by what its name ends in; ConfigError where it cannot be read as that.

    Without a header each row has its first field alone. A .txt file has one prompt a line. `what` begins the sentence
    of an error.
    """
    who = f"{what} {str(path)!r}"
    try:
        return _READERS[path.suffix.lower()](path, who) if header else _first_fields(path, who)
    except KeyError:
        raise ConfigError(f"{who}: give one that ends in {', '.join(ENDINGS)}") from None
    except ConfigError:
        raise
    except (OSError, csv.Error, *UNREADABLE) as error:
        raise ConfigError(f"{who} cannot be read ({error}): give UTF-8 CSV or JSON lines") from error


def column_of(rows: Sequence[Mapping[str, Any]], column: str | None, where: str) -> str:
    """Return the column that holds the prompts: the one named, else the first of `KNOWN` that there is.

    Raises ConfigError with the columns there are.
    """
    there = list(rows[0]) if rows else []
    if column is not None:
        if column in there:
            return column
        raise ConfigError(f"{where} has no column {column!r}: choose one of {there}")
    named = {name.lower(): name for name in there}
    name = next((named[known] for known in KNOWN if known in named), None)
    if name is None and len(there) == 1:
        name = there[0]
    if name is None:
        raise ConfigError(f"{where} has no column that looks like prompts: name one of {there}, as FILE#COLUMN")
    return name


def texts_of(rows: Sequence[Mapping[str, Any]], column: str | None, where: str) -> list[str]:
    """Return the prompts of a column, stripped, without empty ones and repetitions; ConfigError where none is left."""
    if not rows:
        raise ConfigError(f"{where} has no rows: give at least one prompt")
    name = column_of(rows, column, where)
    values = [row.get(name) for row in rows]
    strangers = [value for value in values if value is not None and not isinstance(value, str)]
    if strangers:
        kind = type(strangers[0]).__name__
        raise ConfigError(f"{where}: column {name!r} holds {len(strangers)} values such as a {kind}, not text")
    texts = list(dict.fromkeys(value.strip() for value in values if value and value.strip()))
    if not texts:
        raise ConfigError(f"{where}: column {name!r} is empty: give at least one prompt")
    for text in texts:
        check_whole(text, f"{where}: a prompt in column {name!r}")
    return texts


def _text(path: Path, who: str) -> str:
    return read_text(path, who, advice="Give UTF-8 CSV or JSON lines")


def _csv(path: Path, who: str) -> list[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(_text(path, who), newline=""), strict=True)
    return [{k: v for k, v in row.items() if k is not None} for row in rows]


def _first_fields(path: Path, who: str) -> list[dict[str, Any]]:
    return [{_NO_HEADER: row[0]} for row in csv.reader(io.StringIO(_text(path, who), newline="")) if row]


def _jsonl(path: Path, who: str) -> list[dict[str, Any]]:
    # Not `splitlines`: JSON may hold other ends of a line, such as U+2028, within a text.
    return _objects([json.loads(line) for line in _text(path, who).split("\n") if line.strip()])


def _json(path: Path, who: str) -> list[dict[str, Any]]:
    return _objects(read_json(path, who))


def _objects(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict | str) for row in rows):
        raise ValueError("it holds no list of objects or of texts")
    return [{"prompt": row} if isinstance(row, str) else row for row in rows]


def _txt(path: Path, who: str) -> list[dict[str, Any]]:
    return [{"prompt": line} for line in _text(path, who).splitlines() if line.strip()]


def _seeds(path: Path, who: str) -> list[dict[str, Any]]:
    """The seeds of a pyrit dataset."""
    document = read_yaml(path, who)
    return _objects(document.get("seeds") if isinstance(document, dict) else document)


def _parquet(path: Path, who: str) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{who} needs pyarrow: pip install 'safemerge-callback[recipes]'") from None
    return _objects(parquet.read_table(path).to_pylist())


_READERS = {".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".txt": _txt, ".prompt": _seeds, ".parquet": _parquet}
