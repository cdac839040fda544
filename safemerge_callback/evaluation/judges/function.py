"""Any callable as a judge."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import ConfigError
from ...io.callables import check_callable
from .protocol import Decides, check_decides


class FunctionJudge:
    """A judge from a function of prompt and response that returns a bool.

    With `decides` "refusal" the function says whether the response refuses; with "harm", whether it is free of harm.
    What the function raises is raised on: the caller counts that response as not judged. `folder` is a place in which
    the function may import modules.
    """

    def __init__(
        self,
        function: Callable[[str, str], bool],
        *,
        decides: str = "refusal",
        name: str | None = None,
        folder: str | None = None,
    ) -> None:
        check_callable(function, f"judge {name!r}" if name else "judge", ("prompt", "response"), "a bool")
        self.function, self.folder = function, folder
        self.decides: Decides = check_decides(decides)
        self.name = name or getattr(function, "__qualname__", type(function).__name__)

    def refuses(self, prompt: str, response: str) -> bool:
        """Return the function's verdict; TypeError where it is no bool (a score, say, has no threshold here)."""
        with _searched(self.folder):
            verdict = self.function(prompt, response)
        # numpy's and torch's own booleans are no bool, and are meant as one; a string or a score is not.
        plain = verdict.item() if hasattr(verdict, "item") else verdict
        if not isinstance(plain, bool):
            raise TypeError(f"judge {self.name!r} returned {type(verdict).__name__}, not a bool")
        return plain


def imported(path: str, *, decides: str = "refusal") -> FunctionJudge:
    """Return the judge of `module:function`, imported; ConfigError where there is none.

    Modules are looked for in the present folder too, last, while the module is imported and its function runs.
    """
    module, _, name = path.partition(":")
    folder = str(Path.cwd())
    if not (module and name):
        raise ConfigError(f"judge 'function:{path}' names no function: write function:package.module:name")
    try:
        with _searched(folder):
            importlib.invalidate_caches()
            function = getattr(importlib.import_module(module), name)
    except Exception as error:
        # A module is a program of its own, and raises whatever it likes.
        raise ConfigError(f"judge 'function:{path}' cannot be imported: {type(error).__name__}: {error}") from error
    return FunctionJudge(function, decides=decides, name=path, folder=folder)


@contextmanager
def _searched(folder: str | None) -> Iterator[None]:
    """Let `folder` be the last place where modules are looked for; afterwards the places are those of before."""
    if folder is None or folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
