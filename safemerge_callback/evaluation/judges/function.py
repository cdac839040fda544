"""Any callable as a judge."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ...errors import ConfigError
from .protocol import Decides, check_decides


class FunctionJudge:
    """A judge from a function of prompt and response that returns a bool.

    With `decides` "refusal" the function says whether the response refuses; with "harm", whether it is free of harm.
    What the function raises is raised on: the caller counts that response as not judged.
    """

    def __init__(
        self, function: Callable[[str, str], bool], *, decides: str = "refusal", name: str | None = None
    ) -> None:
        if not callable(function):
            raise ConfigError(f"judge {function!r} is no function: give one of (prompt, response) that returns a bool")
        self.function = function
        self.decides: Decides = check_decides(decides)
        self.name = name or getattr(function, "__qualname__", type(function).__name__)

    def refuses(self, prompt: str, response: str) -> bool:
        """Return the function's verdict; TypeError where it is no bool (a score, say, has no threshold here)."""
        verdict = self.function(prompt, response)
        # numpy's and torch's own booleans are no bool, and are meant as one; a string or a score is not.
        plain = verdict.item() if hasattr(verdict, "item") else verdict
        if not isinstance(plain, bool):
            raise TypeError(f"judge {self.name!r} returned {type(verdict).__name__}, not a bool")
        return plain


def imported(path: str, *, decides: str = "refusal") -> FunctionJudge:
    """Return the judge of `module:function`, imported; ConfigError where there is none."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if module and name else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"judge 'function:{path}' cannot be imported: {error}") from error
    if found is None:
        raise ConfigError(f"judge 'function:{path}' names no function: write function:package.module:name")
    return FunctionJudge(found, decides=decides, name=path)
