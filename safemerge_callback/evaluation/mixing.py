"""Safety rows mixed into training data, for those who would rather mix than replay: lists, data sets, streams."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from ..errors import ConfigError, shown
from ..io.numbers import is_number
from ..signals.rows import SafetyRow
from .row_columns import Writer, row_writer
from .rows import load_rows

# Rows of the training set that its columns are read off.
_FIRST = 64


def mix_safety_data(
    dataset: Any,
    rows: Any,
    *,
    share: float,
    seed: int | random.Random = 0,
    in_format: bool = False,
    columns: Callable[[SafetyRow], Mapping[str, Any]] | None = None,
) -> Any:
    """Return training data with safety rows among its own, in its columns; `dataset` itself is unchanged.

    `share` is in safety rows for each row of `dataset`: 0.03 adds three to a hundred. `rows` is what `load_rows` takes,
    of one kind or both. Of more rows than are needed some are drawn by `seed` (a `random.Random` goes on from its
    state); fewer come again, as evenly as can be, which is told: none is invented.

    - A list, or a `datasets.Dataset`: the same, with round(share × length) rows more, shuffled.
    - A `datasets.IterableDataset`: a stream that takes each next row from the safety rows with a chance of share /
      (1 + share), until the data ends. They come in an order drawn by seed, all before one comes again. `set_epoch`,
      which trainers call, draws order and places anew (by `datasets` 5; before, where the stream is shuffled).

    The columns are those that `row_writer` knows, else what `columns` returns of a row; `in_format` puts each row in
    the data's own system prompt and wrapper. What else the data holds is left as it is.

    Source: SafeInstruct's mixing (Bianchi et al., arXiv:2309.07875). Differs: any rows may be mixed in, harmless
    ones too, best the aligned model's own (`harvest`).

    ConfigError for a share outside [0, 1], rows that `load_rows` refuses, an empty `dataset`, one that is no list nor a
    data set, and columns that a row cannot be written in.
    """
    if not is_number(share) or not 0.0 <= share <= 1.0:
        raise ConfigError(f"share is {shown(share)}: give safety rows for each row of the data, from 0 to 1")
    safety = load_rows(rows, both=False)
    kind = _kind_of(dataset)
    if not share:
        return dataset
    write = _writer(dataset, in_format, columns)
    if kind == "stream":
        return _mixed_stream(dataset, safety, share, seed, write)
    order = seed if isinstance(seed, random.Random) else random.Random(seed)
    added = [dict(write(row)) for row in drawn(safety, round(share * len(dataset)), order)]
    if kind == "list":
        mixed = [*dataset, *added]
        order.shuffle(mixed)
        return mixed
    return _mixed_table(dataset, added, order)


def drawn(rows: Sequence[SafetyRow], count: int, order: random.Random) -> list[SafetyRow]:
    """Return `count` of the rows: all in their order where there are as many, else as many of each as can be.

    Warns where rows come again, and where `count` is 0.
    """
    if not count:
        warnings.warn("safemerge: the share is so small that no safety row is mixed in: raise it", stacklevel=3)
    again, rest = divmod(count, len(rows))
    if count > len(rows):
        times = f"{again}" if not rest else f"{again} or {again + 1}"
        warnings.warn(
            f"safemerge: {count} safety rows are to be mixed in and there are {len(rows)}: each comes {times} times",
            stacklevel=3,
        )
    return [*list(rows) * again, *(order.sample(rows, rest) if rest else ())]


def _kind_of(dataset: Any) -> str:
    """`list`, `table` or `stream`."""
    if isinstance(dataset, list | tuple):
        return "list"
    kinds = {base.__name__ for base in type(dataset).__mro__ if base.__module__.startswith("datasets.")}
    for name, kind in (("Dataset", "table"), ("IterableDataset", "stream")):
        if name in kinds:
            return kind
    splits = f"; of its splits {list(dataset)} give one" if isinstance(dataset, Mapping) else ""
    raise ConfigError(
        f"the training set is a {type(dataset).__name__}: give a list of rows, a datasets.Dataset or a "
        f"datasets.IterableDataset{splits}"
    )


def _writer(dataset: Any, in_format: bool, columns: Callable[[SafetyRow], Mapping[str, Any]] | None) -> Writer:
    if columns is not None:
        return columns
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    first = list(islice(plain, _FIRST))
    if not first:
        raise ConfigError("the training set is empty: there is nothing to mix safety rows into")
    strangers = [row for row in first if not isinstance(row, Mapping)]
    if strangers:
        raise ConfigError(f"the training set has the row {shown(strangers[0])}: give rows that are mappings")
    return row_writer(first, in_format=in_format)


def _mixed_table(dataset: Any, added: Sequence[dict[str, Any]], order: random.Random) -> Any:
    from datasets import Dataset, concatenate_datasets

    if not added:
        return dataset
    places = list(range(len(dataset) + len(added)))
    order.shuffle(places)
    whole = concatenate_datasets([dataset.with_format(None), _table(added, dataset.features, Dataset)])
    form = dict(dataset.format)
    return whole.select(places).with_format(**form.pop("format_kwargs"), **form)


def _mixed_stream(
    dataset: Any, safety: Sequence[SafetyRow], share: float, seed: int | random.Random, write: Writer
) -> Any:
    from datasets import Dataset, interleave_datasets

    seed = seed.getrandbits(32) if isinstance(seed, random.Random) else seed
    # As many shards as the data has, so that its own are dealt to workers and ranks as before.
    shards = max(1, dataset.num_shards)
    added = [dict(write(row)) for row in safety] * -(-shards // len(safety))
    table = _table(added, dataset.features, Dataset)
    endless = table.to_iterable_dataset(num_shards=shards).shuffle(seed=seed, buffer_size=len(added)).repeat(None)
    chances = [1 / (1 + share), share / (1 + share)]
    return interleave_datasets([dataset, endless], chances, seed, stopping_strategy="first_exhausted")


def _table(added: Sequence[dict[str, Any]], features: Any, table: Any) -> Any:
    """The rows with the data's own types; what they lack of its columns is None."""
    if features is None:
        return table.from_list(added)
    columns = {name: [row.get(name) for row in added] for name in features}
    return table.from_dict(columns, features=features)
