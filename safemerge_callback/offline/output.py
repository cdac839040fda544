"""The output folder: nobody's files are lost, and it appears whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..adapters import Adapter, save_adapter
from ..adapters.files import CONFIG, WEIGHTS
from ..decision import JOURNAL_FILE, Journal
from ..errors import AdapterError, ConfigError

CARD = "README.md"
_OWN_FILES = {CONFIG, WEIGHTS, JOURNAL_FILE, CARD}


def free_output(output: str | Path, inputs: Iterable[object], overwrite: bool) -> Path:
    """Return the output folder, absolute; ConfigError where writing it could cost an input or somebody's files."""
    target = Path(output).expanduser().resolve()
    for given in inputs:
        source = getattr(given, "source", None) or getattr(given, "path", None) or given
        if source is not None and Path(str(source)).expanduser().resolve() == target:
            raise ConfigError(f"output {str(output)!r} is one of the inputs: give a new folder.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output {str(output)!r} is a file: give a new folder.")
    held = {path.name for path in target.iterdir()} if target.exists() else set()
    if held and not overwrite:
        raise ConfigError(f"output {str(output)!r} is not empty: give a new folder, or ask to overwrite it.")
    if foreign := sorted(held - _OWN_FILES):
        raise ConfigError(
            f"output {str(output)!r} holds {len(foreign)} things that are no part of an adapter, first {foreign[0]!r}: "
            "it is not overwritten. Give a new folder."
        )
    return target


def write_output(target: Path, merged: Adapter, entries: Iterable[Mapping[str, Any]], card: str) -> None:
    """Write adapter, journal and card into a folder beside `target`, which then takes its place.

    Raises AdapterError where the disk refuses or a factor is not finite; an existing `target` is then as it was.
    """
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        save_adapter(aside, merged)
        journal = Journal(aside / JOURNAL_FILE)
        for entry in entries:
            journal.append(entry)
        (aside / CARD).write_text(card, encoding="utf-8")
        _take_place(aside, target)
    except OSError as error:
        raise AdapterError(f"output {str(target)!r} cannot be written: {error}. Nothing was left there.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _take_place(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    old = aside.with_name(f"{aside.name}.old")
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
