"""An append-only journal, one JSON object a line: every reading, decision and edit. It survives a crash."""

from __future__ import annotations

import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import JournalError
from ..io.addresses import without_folders
from ..io.paths import as_path

# Of the lines: 2 has each module's `limit` in a check. What was written with an older one is read as before.
VERSION = 2
JOURNAL_FILE = "safemerge.jsonl"
# The page that a report of the journal is, in its folder.
PAGE_FILE = "safemerge_report.html"
# Bytes looked through at a time for the end of the last whole line.
_BLOCK = 1 << 16
# How every line of a journal begins: what is cut short of it may be cut off, and nothing else.
_BEGINNING = b'{"kind": '
# Bytes of a journal: what its entries take once they are read is several times that.
_LARGEST = 4 << 30


class Journal:
    """A journal at `path`, opened for appending; its folder is made if need be.

    With `enabled=False` (every rank but the first) nothing is touched. What a crash left of a last line is cut off, so
    that a resumed run goes on with whole lines. Raises JournalError if the file cannot be written or is no journal.
    """

    def __init__(self, path: str | Path, enabled: bool = True) -> None:
        self.path = as_path(path, "journal", error=JournalError)
        self.enabled = enabled
        self._waiting: list[bytes] = []
        if enabled:
            _open(self.path)

    def append(self, entry: Mapping[str, Any]) -> int:
        """Write one entry with the time (ISO 8601, UTC) added, and wait until it is on disk; return how many were.

        NaN and infinities become null, and errors name files without their folders. Raises JournalError for values that
        JSON has no word for, and where the disk refuses: the file then holds whole lines still, and the entry is
        written before the next one.
        """
        if not self.enabled:
            return 0
        words = {"error": without_folders(entry["error"])} if isinstance(entry.get("error"), str) else {}
        stamped = {**entry, **words, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        try:
            line = json.dumps(_plain(stamped), allow_nan=False, ensure_ascii=False) + "\n"
        except TypeError as error:
            raise JournalError(f"journal entry {entry.get('kind')!r} cannot be written as JSON: {error}") from error
        self._waiting.append(line.encode(errors="backslashreplace"))
        try:
            _append(self.path, b"".join(self._waiting))
        except OSError as error:
            raise JournalError(f"journal {str(self.path)!r} cannot be written: {error.strerror}") from error
        written, self._waiting = len(self._waiting), []
        return written


def _append(path: Path, lines: bytes) -> None:
    """Write whole lines behind whole lines, or nothing."""
    # Unbuffered: what a buffer holds back would be written again when the file is closed.
    with path.open("a+b", buffering=0) as file:
        end = _end_of_lines(file)
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(end)
            raise


def _end_of_lines(file: io.FileIO) -> int:
    """Cut off what a failed write left after the last line feed; return the file's size."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        at = (file.read(end - start) or b"").rfind(b"\n")
        end = start if at < 0 else start + at + 1
        if at >= 0:
            break
    if end < size:
        file.truncate(end)
    return end


def _open(path: Path) -> None:
    require_journal_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise JournalError(
            f"journal {str(path)!r} cannot be written: {error.strerror}. Set `journal` to a file that can."
        ) from error
    *lines, tail = _read(path)
    _parsed(lines, tail, path)
    if tail:
        os.truncate(path, path.stat().st_size - len(tail))


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Return the entries in order. What a crash or a full disk left of a line is passed over, and one warning says so.

    Raises JournalError if there is no such file, or with its number for any other line that is not a JSON object.
    """
    return list(numbered_entries(path).values())


def numbered_entries(path: str | Path) -> dict[int, dict[str, Any]]:
    """Return what `read_journal` does, by the numbers of the lines, from 1."""
    place = as_path(path, "journal", error=JournalError)
    *lines, tail = _read(place)
    entries, torn = _parsed(lines, tail, place)
    tell_torn(torn, place)
    return entries


def require_journal_file(path: Path) -> None:
    """Raise JournalError for a device or a pipe, which may never end, and for more than a journal ever holds."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise JournalError(f"journal {str(path)!r} is no regular file: give a journal ({JOURNAL_FILE}).")
    if path.exists() and path.stat().st_size > _LARGEST:
        size = f"{path.stat().st_size:,} bytes, more than the {_LARGEST:,}"
        raise JournalError(f"journal {str(path)!r} has {size} that are read: set it aside.")


def parse_lines(lines: Iterable[bytes], path: Path, first: int = 1) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Return the entries of whole lines of the journal at `path` by their numbers, and the numbers of torn lines.

    The first line is of number `first`. Raises JournalError as `read_journal`.
    """
    entries, torn = {}, []
    for number, line in enumerate(lines, first):
        entry, whole = _entry(line, f"journal {str(path)!r}, line {number}")
        if entry is not None:
            entries[number] = entry
        if not whole:
            torn.append(number)
    return entries, torn


def tell_torn(torn: Sequence[int], path: Path) -> None:
    """Warn of lines that were passed over, if there are any."""
    if torn:
        what = f"line {torn[0]} was" if len(torn) == 1 else f"{len(torn)} lines, first line {torn[0]}, were"
        words = f"safemerge: journal {str(path)!r}: {what} cut off by a full disk or a crash; read without it"
        warnings.warn(words, stacklevel=4)


def _read(path: Path) -> list[bytes]:
    """What stands between line feeds; the last is what follows them all."""
    require_journal_file(path)
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise JournalError(f"journal {str(path)!r} cannot be read: {error.strerror}") from error


def _parsed(lines: Sequence[bytes], tail: bytes, path: Path) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """As `parse_lines`, of a whole file: lines that were cut off are a journal's only beside others that are whole."""
    entries, torn = parse_lines(lines, path)
    if torn and not entries:
        raise JournalError(f"journal {str(path)!r}, line {torn[0]}: not JSON. Give a journal ({JOURNAL_FILE}).")
    first = next(iter(entries), None)
    strange = first is not None and "kind" not in entries[first]
    begun = tail.strip(b"\0")
    if strange or not begun.startswith(_BEGINNING[: len(begun)]):
        where = f"line {first}" if strange else "its end"
        raise JournalError(f"{str(path)!r} exists and is no journal, {where}: not an entry of ours. Give another file.")
    return entries, [*torn, len(lines) + 1] if tail else torn


def _entry(line: bytes, where: str) -> tuple[dict[str, Any] | None, bool]:
    """The entry of a line, and whether the line is whole; of a torn one what was written behind it, or None."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        # Every entry begins so; zeros are what a power cut leaves.
        if line[:1] not in (b"{", b"\0"):
            raise JournalError(f"{where}: not JSON ({error}). Give a journal ({JOURNAL_FILE}).") from error
        return _behind(line), False
    if not isinstance(entry, dict):
        raise JournalError(f"{where}: not a JSON object but {type(entry).__name__}")
    return entry, True


def _behind(line: bytes) -> dict[str, Any] | None:
    for start in re.finditer(rb'\{"kind": ', line):
        with suppress(ValueError, RecursionError):
            behind: dict[str, Any] = json.loads(line[start.start() :])
            # Only an entry has a time: what else ends here is a part of the torn one.
            return behind if "time" in behind else None
    return None


def _plain(value: Any) -> Any:
    """`value` as JSON has it: NaN and infinities are None, paths are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
