"""TRL's `datasets:` of a YAML file: several data, each with its split, columns and share, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_callback.errors import ConfigError, nearest, shown
from safemerge_callback.evaluation.rows import load_table
from safemerge_callback.io.numbers import is_number

from .rows import load_rows
from .table import RowForm, Rows, formed, rows_in_form

if TYPE_CHECKING:
    from recipes.arguments import ExampleArguments

# What TRL's DatasetConfig knows.
KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")
# Where `datasets.load_dataset` looks, beside a split.
_PLACE = ("name", "data_dir", "data_files")
_FILES = (".jsonl", ".csv", ".json")


def training_rows(data: ExampleArguments, form: RowForm) -> Rows:
    """Return the rows that a recipe's settings name, in a form; ConfigError for what cannot be had."""
    rows = mixture_rows(form, data.datasets) if data.datasets else rows_in_form(form, data.data, data.data_split)
    return rows[: data.num_examples]


def mixture_rows(form: RowForm, entries: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the rows of all entries, in their order, as TRL's `get_dataset` joins them.

    An entry has a `path`, and may have `name`, `data_dir`, `data_files`, `split` (`train`), `columns`, which are kept,
    and `fraction`, in all entries or in none: of each the first rows, so many that shares are these and no row is taken
    twice. `path` is whatever `datasets.load_dataset` takes; differs from TRL: a file by its own path, or a name of
    the recipes' own data, too, and columns are those of `form`. ConfigError, with the entry, for what is none of this.
    """
    parts = [(entry, _rows(form, entry, f"datasets[{at}]")) for at, entry in enumerate(entries)]
    shares = [entry.get("fraction") for entry, _ in parts]
    if all(share is None for share in shares):
        return [row for _, rows in parts for row in rows]
    weights = _weights(shares)
    total = min(len(rows) / weight for (_, rows), weight in zip(parts, weights, strict=True))
    return [row for (_, rows), weight in zip(parts, weights, strict=True) for row in rows[: round(weight * total)]]


def _weights(shares: Sequence[Any]) -> list[float]:
    for at, share in enumerate(shares):
        if not is_number(share) or share <= 0:
            raise ConfigError(f"datasets[{at}]: fraction is {share!r}: give each entry one above 0, or none of them")
    return [share / sum(shares) for share in shares]


def _rows(form: RowForm, entry: Any, who: str) -> Rows:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise ConfigError(
            f"{who} is {shown(entry)}: give a mapping with path, and of {', '.join(KEYS[1:])} what you need"
        )
    for key in entry:
        if key not in KEYS:
            raise ConfigError(f"{who}: key {key!r} is unknown: choose among {', '.join(KEYS)}{nearest(str(key), KEYS)}")
    path, split, columns = entry["path"], entry.get("split") or "train", entry.get("columns")
    place = {key: entry[key] for key in _PLACE if entry.get(key) is not None}
    if path in form.names:
        if place or columns:
            raise ConfigError(f"{who}: {path!r} is data of the recipes, which has split and fraction alone beside it")
        return rows_in_form(form, path, split)
    where = f"{who} {path!r}"
    if Path(path).suffix.lower() in _FILES and not place:
        if split != "train":
            raise ConfigError(f"{where} is a file, which has no split {split!r}: leave split out")
        table: Sequence[Any] = load_table(path, who)[1]
    else:
        table = list(load_rows(path, place.pop("name", None), split, **place))
    return formed(form, [_kept(row, columns, where) for row in table], where)


def _kept(row: Any, columns: Sequence[str] | None, where: str) -> Any:
    """A row with the columns that are asked for; ConfigError, with those that it has, where one is not there."""
    if not columns or not isinstance(row, Mapping):
        return row
    for name in columns:
        if name not in row:
            raise ConfigError(
                f"{where} has no column {name!r}, only {sorted(map(str, row))}{nearest(str(name), map(str, row))}"
            )
    return {name: row[name] for name in columns}
