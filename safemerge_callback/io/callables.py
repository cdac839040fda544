"""What a user's function must take: asked before it is ever called."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, shown


def check_callable(function: Any, what: str, arguments: Sequence[str], returns: str) -> None:
    """Raise ConfigError unless `function` can be called with these positional arguments.

    `what` says whose it is and begins the sentence; `returns` is what it should give. What Python cannot look into (a
    function of C) passes.
    """
    advice = f"give a function of {' and '.join(arguments)} that returns {returns}"
    if not callable(function):
        raise ConfigError(f"{what} is {shown(function)}: {advice}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise ConfigError(f"{what} {name}{signature} cannot be called ({error}): {advice}") from None
