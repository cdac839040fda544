"""One of the values there are: true or false, or a name out of those of gates, methods, presets, judges, tasks, ..."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, SafeMergeError, nearest, shown


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


def truth(value: Any, what: str, *, error: type[SafeMergeError] = ConfigError) -> bool:
    """Return `value`, true or false; `error` for anything else: a text such as "false" would count as true."""
    if isinstance(value, bool):
        return value
    raise error(f"{what} is {shown(value)}: give true or false")
