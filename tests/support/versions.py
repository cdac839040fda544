"""What a library at its lower bound does not have yet: tests of it are skipped there, by name."""

from __future__ import annotations

from typing import Any

import pytest


def found_in(module: Any, name: str) -> Any:
    """Return what a module holds by that name; the test is skipped where this version has none."""
    if not hasattr(module, name):
        pytest.skip(f"{module.__name__} of this version has no {name}")
    return getattr(module, name)
