"""What counts as a number in a setting or a file: one rule for all that is asked for."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

# What a seed, a step or a count may be: more fits neither torch's generators nor a float without loss of meaning.
_LARGEST = 2**64


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether `value` is a finite real number that a float can hold, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer past float's range
        return False


def is_whole(value: Any, least: int = -_LARGEST) -> TypeGuard[int]:
    """Return whether `value` is an integer of at least `least`, of 64 bits at most, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LARGEST
