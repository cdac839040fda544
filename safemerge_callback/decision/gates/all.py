"""`all`: everything."""

from __future__ import annotations

from ..reading import Readings
from .common import Verdict, not_finite
from .registry import gate, never


@gate(name="all", asks=never, whole=True)
def all_modules(readings: Readings) -> dict[str, Verdict]:
    """Merge every module whose update is finite, moved or not (RESTA, arXiv:2402.11746, has no gate)."""
    return {name: not_finite(reading) or Verdict(True, "gate all") for name, reading in readings.items()}
