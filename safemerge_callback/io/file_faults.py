"""Why a file could not be read: the file is asked before a library's error is translated."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_ADVICE = {
    errno.EACCES: "Give this user the right to read it (chmod, or ask its owner).",
    errno.EPERM: "Give this user the right to read it (chmod, or ask its owner).",
    errno.ENOENT: "Was it moved or deleted meanwhile? Put it back.",
    errno.EISDIR: "Give the file itself.",
}


def reading_fault(
    path: Path, error: BaseException, advice: str = "Fetch or save it again.", damage: str = "is corrupt or truncated"
) -> str:
    """Return what is wrong with `path`, while reading which `error` was raised, and what to do: a sentence's end.

    `cannot be read: permission denied. ...` where the system refuses it. What the system gives is damaged, and so
    `damage`, the error and `advice`.
    """
    refusal = error if isinstance(error, OSError) and error.strerror else _refusal(path)
    if refusal is None:
        return f"{damage} ({error}). {advice}"
    what = _ADVICE.get(refusal.errno or 0, "Look at the disk or network that it lies on, and try again.")
    return f"cannot be read: {str(refusal.strerror or refusal).lower()}. {what}"


def _refusal(path: Path) -> OSError | None:
    """What the system says when the first byte of a file, or a folder's list, is asked for; None where it gives it."""
    try:
        if path.is_dir():
            os.scandir(path).close()
        elif path.exists() and not path.is_file():  # a pipe would be waited for
            return OSError(errno.EINVAL, "it is no regular file")
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        return error
    return None
