"""Names that moved or are called otherwise: the old one is still given, with a warning, for two minor versions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def renamed(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of `module`, which finds each name of `homes` in the module that it moved to.

    A home `MODULE:NAME` has it under another name. It warns with DeprecationWarning and raises AttributeError for any
    other name.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, now = homes[name].partition(":")
        words = (
            f"is now {now} of {home}: import that" if now else f"moved from {module} to {home}: import it from there"
        )
        warnings.warn(f"{name} {words}", DeprecationWarning, 2)
        return getattr(import_module(home), now or name)

    return find
