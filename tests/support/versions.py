"""What a library at its lower bound does not have yet: tests of it are skipped there, by name."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

_BOUNDS = Path(__file__).parents[2] / "requirements" / "oldest.txt"


def found_in(module: Any, name: str) -> Any:
    """Return what a module holds by that name; the test is skipped where this version has none."""
    if not hasattr(module, name):
        pytest.skip(f"{module.__name__} of this version has no {name}")
    return getattr(module, name)


def above_bound(library: str, words: str) -> None:
    """Skip the test where a library is the one of its lower bound; `words` say what later ones do and that does not."""
    bounds = dict(re.findall(r"^([\w-]+)==(\S+)$", _BOUNDS.read_text(), flags=re.M))
    if version(library) == bounds[library]:
        pytest.skip(f"{library} {bounds[library]}: not yet so that {words}")
