"""Whether progress may be drawn: on a terminal or in a notebook, and where nobody has asked for quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_QUIET: ContextVar[bool] = ContextVar("safemerge_quiet", default=False)


def bars_shown() -> bool:
    """Whether stderr, where all bars are drawn, is a terminal or a notebook's, outside of `without_bars`."""
    if _QUIET.get() or sys.stderr is None:
        return False
    return sys.stderr.isatty() or type(sys.stderr).__module__.partition(".")[0] == "ipykernel"


@contextmanager
def without_bars(quiet: bool = True) -> Iterator[None]:
    """Let nothing within draw progress; with `quiet` False all is as it was."""
    token = _QUIET.set(quiet or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(token)
