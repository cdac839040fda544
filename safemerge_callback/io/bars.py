"""Whether progress may be drawn: on a terminal, and where nobody has asked for quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_QUIET: ContextVar[bool] = ContextVar("safemerge_quiet", default=False)


def bars_shown() -> bool:
    """Whether stderr, where all bars are drawn, is a terminal outside of `without_bars`."""
    return not _QUIET.get() and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def without_bars(quiet: bool = True) -> Iterator[None]:
    """Let nothing within draw progress; with `quiet` False all is as it was."""
    token = _QUIET.set(quiet or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(token)
