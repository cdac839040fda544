"""Files and folders that take their place whole: a kill or a full disk, at any moment, leaves the old or the new.

What is written goes to a hidden sibling, `.NAME.<process>.part`, reaches the disk, and takes its place by a rename.
What a killed process left beside a place is put right, or removed, by the next one that writes there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# part: being written. into: whole, its files are being moved into the folder. old: was replaced by a whole folder.
_KINDS = ("part", "into", "old")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give an absent path beside `path` to write to; at the end of the `with` it takes the place of `path`.

    After an error `path` is as it was, and nothing is left beside it. A link is followed, and a file's mode is kept.
    Raises OSError where the disk refuses, and before anything is written where `path` is a folder, a device or a pipe.
    """
    place = _place(path)
    if place.exists() and not place.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    settle(place, clean=True)
    part = _beside(place, "part")
    try:
        yield part
        if place.exists():
            shutil.copymode(place, part)
        _sync(part)
        part.replace(place)
        _sync_folder(place.parent)
    finally:
        _remove(part)


@contextmanager
def whole_folder(path: Path, *, into: bool = False) -> Iterator[Path]:
    """Give an absent path beside `path` to make a folder at; at the end of the `with` it takes the place of `path`.

    A folder that is there already is replaced, or with `into` keeps its other files: the new ones, which are files
    only, then replace those of their names, never so that a reader finds some of both. After an error `path` is as it
    was, and nothing is left beside it. A kill may leave no folder there, or one that lacks files: the next that writes
    there, or `settle`, puts that right. Raises OSError where the disk refuses.
    """
    place = _place(path)
    settle(place, clean=True)
    part = _beside(place, "part")
    try:
        yield part
        for folder, _, names in os.walk(part):
            for name in names:
                _sync(Path(folder, name))
            _sync_folder(Path(folder))
        if into and place.exists():
            _require_files(place, [path.name for path in part.iterdir()])
            _move_into(part.rename(_beside(place, "into")), place)
        else:
            _take_place(part, place)
        _sync_folder(place.parent)
    finally:
        _remove(part)


def settle(path: Path, *, clean: bool = False) -> None:
    """Finish what a killed process began to put in the place of `path`; `clean` is for who will write there.

    Then what it was still writing is removed as well. Raises OSError.
    """
    place = _place(path)
    for left, kind in _left(place):
        if kind == "part":
            if clean:
                _remove(left)
        elif kind == "into" and place.is_dir():
            _move_into(left, place)
        elif kind == "old" and not place.exists():
            left.rename(place)
        else:
            _remove(left)


def _place(path: Path) -> Path:
    """Where `path` really lies, so that its sibling is on the same disk; unlike `resolve` it bears loops of links."""
    return Path(os.path.realpath(path))


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{os.getpid()}.{kind}")


def _left(place: Path) -> list[tuple[Path, str]]:
    """What processes that are gone left beside `place`, with its kind."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(\d+)\.({'|'.join(_KINDS)})")
    try:
        names = sorted(path.name for path in place.parent.iterdir())
    except FileNotFoundError:
        return []
    matches = [match for match in map(pattern.fullmatch, names) if match and not _alive(int(match[1]))]
    return [(place.with_name(match[0]), match[2]) for match in matches]


def _alive(pid: int) -> bool:
    """Whether another process of this number lives; where that cannot be asked, it is taken to."""
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _take_place(part: Path, place: Path) -> None:
    old = _beside(place, "old")
    if place.exists():
        place.rename(old)
    try:
        part.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    _remove(old)


def _require_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(folder / name))


def _move_into(whole: Path, place: Path) -> None:
    """Remove all that will be replaced, then move the new files in: what is found half-way lacks files, not agreement.

    Going on after a kill needs nothing but what is still in `whole`.
    """
    names = sorted(path.name for path in whole.iterdir())
    for name in names:
        (place / name).unlink(missing_ok=True)
    for name in names:
        (whole / name).rename(place / name)
    _sync_folder(place)
    whole.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk, where the system knows how to."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
