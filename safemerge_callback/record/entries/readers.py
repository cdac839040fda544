"""A journal read back: what each of its entries adds to a history."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import JournalError
from ..history import DERIVED, History, journal_in, title_of
from ..journal import numbered_entries
from .checks import read_check, read_merge, read_taken_back
from .corrections import read_change, read_gradient
from .probes import read_probe, read_rule
from .run import read_best, read_end, read_error, read_start

READERS: dict[str, Callable[[History, Mapping[str, Any]], None]] = {
    "start": read_start,
    "check": read_check,
    "merge": read_merge,
    "change": read_change,
    "gradient": read_gradient,
    "probe": read_probe,
    "rollback": read_taken_back,
    "undo": read_taken_back,
    "trigger": read_rule,
    "stop": read_rule,
    "error": read_error,
    "best": read_best,
    "end": read_end,
}


def read_history(source: str | Path) -> History:
    """Return the history of a journal file, or of the run folder that holds `safemerge.jsonl`.

    Raises JournalError when there is no journal, when it tells of nothing yet but the start, or when an entry is not
    one of ours.
    """
    path = journal_in(source)
    history = History(title_of(path))
    for number, entry in numbered_entries(path).items():
        add_entry(history, entry, f"journal {str(path)!r}, line {number}")
    if history.empty:
        raise JournalError(
            f"journal {str(path)!r} holds no check yet and no probe, and no gradient term: there is nothing to report."
        )
    return history


def add_entry(history: History, entry: Mapping[str, Any], where: str) -> None:
    """Add one entry to `history`; a kind that a later release writes adds nothing.

    Raises JournalError that begins with `where` for an entry that lacks what its kind has.
    """
    try:
        if entry["kind"] in READERS:
            READERS[entry["kind"]](history, entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise JournalError(f"{where}: not an entry of ours ({error!r}).") from error
    for name in DERIVED:
        history.__dict__.pop(name, None)
