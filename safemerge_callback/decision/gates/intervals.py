"""Which decisions do intervals leave open? What gates share that rank modules, or merge below a cosine of their own."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping

from ..reading import Reading, Readings
from .common import excluded


def movable(readings: Readings) -> dict[str, Reading]:
    """Return the readings that a cosine decides."""
    return {name: reading for name, reading in readings.items() if excluded(reading) is None}


def straddles(reading: Reading, limit: float, *, exactly: bool = False) -> bool:
    """Return whether `limit` lies in the interval. What begins at it does not: merged is below it, strictly.

    `exactly`: whether what lies wholly below is open, too, since the cosine itself counts there.
    """
    return reading.lower < limit and (exactly or limit <= reading.upper)


def unranked(moved: Mapping[str, Reading], count: int) -> list[str]:
    """Return the modules that may or may not be among the `count` of lowest cosine.

    One is among them if fewer than that many others can lie as low as it lies at most, and is not if that many must lie
    lower than it lies at least.
    """
    lowers, uppers = sorted(r.lower for r in moved.values()), sorted(r.upper for r in moved.values())
    return [
        name
        for name, r in moved.items()
        if bisect_right(lowers, r.upper) - 1 >= count and bisect_left(uppers, r.lower) < count
    ]
