"""The output folder: nobody's files are lost, and it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..adapters.files import CONFIG, TOKENIZER, WEIGHTS
from ..errors import AdapterError, ConfigError, shown
from ..io.choices import truth
from ..io.outputs import same_place
from ..io.paths import as_path
from ..io.whole_file import settle, whole_folder
from ..record import JOURNAL_FILE, PAGE_FILE, Journal

CARD = "README.md"
RECIPE = "safemerge.yaml"
_OWN_FILES = {CONFIG, WEIGHTS, JOURNAL_FILE, PAGE_FILE, CARD, RECIPE, *TOKENIZER}


def free_output(output: str | Path, inputs: Iterable[object], overwrite: bool, more: Iterable[str] = ()) -> Path:
    """Return the output folder, absolute; ConfigError where writing it could cost an input or somebody's files.

    `more` names files that the output will hold beside an adapter's own, which `overwrite` may replace too.
    """
    allowed = truth(overwrite, "overwrite")
    target = as_path(output, "output").resolve()
    with suppress(OSError):
        settle(target)
    for given in inputs:
        source = getattr(given, "source", None) or getattr(given, "path", None) or given
        if same_place(source, target):
            raise ConfigError(f"output {str(output)!r} is one of the inputs: give a new folder.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output {shown(output)} is no folder: give a new folder.")
    held = {path.name for path in target.iterdir()} if target.exists() else set()
    if held and not allowed:
        raise ConfigError(f"output {str(output)!r} is not empty: give a new folder, or ask to overwrite it (--force).")
    if foreign := sorted(held - _OWN_FILES - {*more}):
        raise ConfigError(
            f"output {str(output)!r} holds {len(foreign)} things that are no part of an adapter, first {foreign[0]!r}: "
            "it is not overwritten. Give a new folder."
        )
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an absent folder beside `target`, which takes its place at the end of the `with`; after an error it is gone.

    Raises AdapterError where the disk refuses; an existing `target` is then as it was.
    """
    try:
        with whole_folder(target) as aside:
            yield aside
    except OSError as error:
        raise AdapterError(f"output {str(target)!r} cannot be written: {error}. Nothing was left there.") from error


def write_journal(folder: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write the journal of a merge of files into `folder`."""
    journal = Journal(folder / JOURNAL_FILE)
    for entry in entries:
        journal.append(entry)
