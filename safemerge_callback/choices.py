"""A name out of the names there are: gates, methods, presets, judges, tasks, operators, ..."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import ConfigError, SafeMergeError, nearest, shown


def one_of(
    value: Any,
    allowed: Iterable[str],
    what: str,
    *,
    error: type[SafeMergeError] = ConfigError,
    problem: str = "is unknown",
) -> str:
    """Return `value`, one of the names `allowed`; `error` with the nearest of them for any other value.

    `what` says what is chosen and begins the sentence, and `problem` what is wrong with another name.
    """
    names = list(allowed)
    if isinstance(value, str) and value in names:
        return value
    raise error(f"{what} {shown(value)} {problem}: choose one of {names}{nearest(value, names)}")
