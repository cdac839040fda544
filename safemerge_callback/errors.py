"""The errors of this package: each says who, which value, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

# Letters of a value that a message shows.
_SHOWN = 120


class SafeMergeError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SafeMergeError, ValueError):
    """A setting that does not exist, has no meaning, or contradicts another."""


class AdapterError(SafeMergeError, ValueError):
    """A LoRA adapter, live or on disk, that cannot be measured or merged exactly."""


class SubspaceError(SafeMergeError, ValueError):
    """A checkpoint or safety-subspace file that is corrupt, unsafe, or belongs to another model."""


class PlanError(SafeMergeError, ValueError):
    """A merge plan that cannot be made or applied; nothing was written."""


class JournalError(SafeMergeError, OSError):
    """A journal that cannot be written or read."""


class TrackerError(SafeMergeError, RuntimeError):
    """A tracker that was asked for and has no live run; what it would have shown is in the journal."""


def nearest(name: Any, allowed: Iterable[str], then: str = "") -> str:
    """Return the end of a sentence about an unknown name: `; did you mean 'x'?`, the allowed one closest to it.

    `then` is the advice that follows: a sentence of its own after the question, a clause after a colon where no name is
    close.
    """
    close = difflib.get_close_matches(name, list(allowed), n=1) if isinstance(name, str) else []
    if not close:
        return f": {then}" if then else ""
    return f"; did you mean {close[0]!r}?" + (f" {then[0].upper()}{then[1:]}" if then else "")


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(value: Any) -> str:
    """Return `value` as a message shows it: its repr, a path's as text, cut in the middle where it is long.

    Its type where it has none: an integer of thousands of digits, or what holds itself too many times over.
    """
    try:
        text = repr(str(value) if isinstance(value, PurePath) else value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 4 :]}"
