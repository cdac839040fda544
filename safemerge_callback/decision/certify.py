"""Which decisions do readings with intervals leave open? The others are those of the exact measure, and proven."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from .gates import check_gate, excluded
from .reading import Readings


def undecided(readings: Readings, gate: str, *, threshold: float = 0.35, num_layers: int | None = None) -> list[str]:
    """Return the modules that must be read exactly before `gate` may decide, in the order of the readings.

    Once these are exact, the gate's decision on every module is that of exact readings alone. None are returned where
    the readings are exact, or where the gate asks no cosine (`all`, `watch`). Raises ConfigError for knobs that the
    gate cannot use.
    """
    check_gate(gate, threshold, num_layers)
    if gate == "threshold":
        # Merged below the threshold, strictly: an interval that begins at it is decided.
        return [name for name, r in readings.items() if r.interval and r.lower < threshold <= r.upper]
    return _unranked(readings, num_layers) if gate == "num_layers" and num_layers else []


def _unranked(readings: Readings, num_layers: int) -> list[str]:
    """The modules that may or may not be among the `num_layers` of lowest cosine.

    One is among them if fewer than that many others can lie as low as it lies at most, and is not if that many must lie
    lower than it lies at least.
    """
    moved = {name: reading for name, reading in readings.items() if excluded(reading) is None}
    lowers, uppers = sorted(r.lower for r in moved.values()), sorted(r.upper for r in moved.values())
    return [
        name
        for name, r in moved.items()
        if r.interval and bisect_right(lowers, r.upper) - 1 >= num_layers and bisect_left(uppers, r.lower) < num_layers
    ]
