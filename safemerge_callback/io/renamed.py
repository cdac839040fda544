"""Names that moved to another floor: the old place still gives them, with a warning, for two minor versions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def renamed(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of `module`, which finds each name of `homes` in the module that it moved to.

    It warns with DeprecationWarning and raises AttributeError for any other name.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{name} moved from {module} to {homes[name]}: import it from there", DeprecationWarning, 2)
        return getattr(import_module(homes[name]), name)

    return find
