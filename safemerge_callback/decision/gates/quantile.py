"""`quantile`: a share of the modules."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..reading import Readings
from .checks import check_quantile
from .common import Verdict, by_cosine, lowest, movable, unranked
from .registry import gate

# So that 0.29 of 100 modules is 29, though the product of the two floats is just under it.
_ROUNDING = 1e-9


def share_of(quantile: float, modules: int) -> int:
    """Return ⌊q·n⌋."""
    return min(modules, math.floor(quantile * modules + _ROUNDING))


def open_of(readings: Readings, *, quantile: float) -> Iterable[str]:
    """Return the modules that may or may not be among the lowest."""
    moved = movable(readings)
    return unranked(moved, share_of(quantile, len(moved)))


@gate(knob="quantile", ranked=True, open_of=open_of)
def quantile(readings: Readings, *, quantile: float) -> dict[str, Verdict]:
    """Merge the share `quantile` of the modules that have moved: the ⌊q·n⌋ of lowest cosine, ties by name.

    Source: none; gate `num_layers` for models of any size. ConfigError for a share outside (0, 1].
    """
    check_quantile(quantile)
    count = share_of(quantile, len(by_cosine(readings)))
    return lowest(readings, count, lambda c: f"{'among' if c else 'not among'} the lowest {quantile:g} ({count})")
