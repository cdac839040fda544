"""A user's text as a path: asked of the system once, so that no text raises anything but the package's own error."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SafeMergeError, shown

# What the system says of a path at which there is nothing yet.
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def as_path(path: Any, what: str, *, error: type[SafeMergeError] = ConfigError) -> Path:
    """Return `path` as a path, `~` and `~user` filled in; nothing needs to be there.

    `what` says whose path it is and begins the sentence of `error`, raised for what is no text and no path, for an
    empty text, and for one that the system refuses: a NUL, a user who is not there, a name that is too long, links
    that lead in a circle, a folder that may not be entered.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise error(f"{what} is {shown(path)}: give a path, as text")
    text = os.fspath(path)
    if not text:
        raise error(f"{what} is an empty text: give a path")
    try:
        path = Path(text).expanduser()
        path.stat()
    except RuntimeError as problem:
        raise error(f"{what} {shown(text)}: there is no such user, or no home directory ({problem})") from problem
    except ValueError as problem:  # a NUL, or what has no place in a file's name
        raise error(f"{what} {shown(text)} can be no path: {problem}") from problem
    except OSError as problem:
        if problem.errno not in _ABSENT:
            raise error(f"{what} {shown(text)} cannot be used: {problem.strerror}") from problem
    return path


def existing(place: Any) -> Path | None:
    """Return the path at which `place` is found; None where nothing is there, or where it could be no path at all."""
    try:
        path = as_path(place, "path")
        return path if path.exists() else None
    except (ConfigError, OSError):
        return None
