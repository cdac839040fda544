"""`watch`: nothing."""

from __future__ import annotations

from ..reading import Readings
from .common import Verdict, not_finite
from .registry import gate, never


@gate(asks=never, merges=False)
def watch(readings: Readings) -> dict[str, Verdict]:
    """Merge nothing: readings are for the record."""
    return {name: not_finite(reading) or Verdict(False, "gate watch") for name, reading in readings.items()}
