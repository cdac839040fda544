"""`all` and `watch`: everything, and nothing."""

from __future__ import annotations

from ..reading import Readings
from .common import Verdict, not_finite


def all_modules(readings: Readings) -> dict[str, Verdict]:
    """Merge every module whose update is finite, moved or not (RESTA, arXiv:2402.11746, has no gate)."""
    return {name: not_finite(reading) or Verdict(True, "gate all") for name, reading in readings.items()}


def watch(readings: Readings) -> dict[str, Verdict]:
    """Merge nothing: readings are for the record."""
    return {name: not_finite(reading) or Verdict(False, "gate watch") for name, reading in readings.items()}
