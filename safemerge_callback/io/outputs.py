"""What may be written where: no output takes the place of an input, of a device, or of another kind of file.

Checked before anything is computed, and that the place can be written to; again when it is written, whole or not at
all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

from ..errors import ConfigError, SafeMergeError, shown
from .paths import as_path, existing
from .whole_file import whole_file

# Bytes at a file's beginning that tell what it is.
_HEAD = 4096


class FileKind(NamedTuple):
    """A kind of file that we write: what it is called, and whether a file that begins with these bytes is of it."""

    name: str
    begins: Callable[[bytes], bool]


PICTURE = FileKind("a picture", lambda head: head.startswith((b"\x89PNG", b"%PDF", b"<?xml", b"<svg")))


def free_output(
    output: Any,
    what: str,
    kind: FileKind,
    inputs: Iterable[Any] = (),
    *,
    error: type[SafeMergeError] = ConfigError,
) -> Path:
    """Return `output` as a path that a file of `kind` may be written to.

    `what` names the output in `error`, raised where it can be no path, is (through links, too) one of the `inputs`, or
    is there already as anything but an empty file or one of this kind, and where its folder takes no files.
    """
    path = as_path(output, what, error=error)
    who = f"{what} {shown(output)}"
    if any(same_place(source, path) for source in inputs):
        raise error(f"{who} is one of the inputs: give another name")
    if not path.exists():
        if not path.name or path.name == "..":
            raise error(f"{who} names no file: give one")
        require_writable(path, what, error=error)
        return path
    if not path.is_file():
        there = "a folder" if path.is_dir() else "no regular file (a device or a pipe)"
        raise error(f"{who} is {there}: give the path of a file")
    try:
        head = _beginning(path)
    except OSError as problem:
        raise error(f"{who} is there and cannot be read: {problem.strerror}. Give another name") from problem
    if head and not kind.begins(head):
        raise error(f"{who} is there and is not {kind.name}, so it is not replaced: give another name, or remove it")
    require_writable(path, what, error=error)
    return path


def require_writable(path: Path, what: str, *, error: type[SafeMergeError] = ConfigError) -> None:
    """Raise `error` where nothing could be written at `path`, a file or a folder, which need not be there.

    The nearest folder that is there is asked for a file without a name, which is gone at once.
    """
    place = Path(os.path.realpath(path))
    folder = next(one for one in place.parents if one.exists())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise _unwritten(what, path, problem, error) from problem


def _unwritten(what: str, output: Any, problem: OSError, error: type[SafeMergeError]) -> SafeMergeError:
    return error(f"{what} {shown(output)} cannot be written: {problem.strerror or problem}.")


@contextmanager
def new_output(
    output: Any,
    what: str,
    kind: FileKind,
    inputs: Iterable[Any] = (),
    *,
    error: type[SafeMergeError] = ConfigError,
) -> Iterator[Path]:
    """Check as `free_output`, and give an absent path to write to, which takes the place of `output` in the end.

    Its folder is made if need be. Raises `error` as `free_output`, and where the disk refuses; nothing is left then.
    """
    path = free_output(output, what, kind, inputs, error=error)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            yield part
    except SafeMergeError:
        raise
    except OSError as problem:
        raise _unwritten(what, output, problem, error) from problem


def same_place(one: Any, other: Any) -> bool:
    """Return whether both are there and are the same file or folder, through links of either kind."""
    places = existing(one), existing(other)
    with suppress(OSError):
        return places[0] is not None and places[1] is not None and places[0].samefile(places[1])
    return False


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)
