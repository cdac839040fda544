"""Which decisions do readings with intervals leave open? The others are those of the exact measure, and proven."""

from __future__ import annotations

from typing import Unpack

from .gates import Gate, Knobs, as_gate
from .reading import Readings


def undecided(readings: Readings, gate: str | Gate, **knobs: Unpack[Knobs]) -> list[str]:
    """Return the modules that must be read exactly before `gate` may decide, in the order of the readings.

    Once these are exact, the gate's decision on every module is that of exact readings alone, and so is, with `rearm`,
    whether it lies that far above the gate, and, with `soft`, its weights. None are returned where the readings are
    exact, or where the gate asks no cosine (`all`, `watch`, `random` with `num_layers`). Raises ConfigError for knobs
    that the gate cannot use, and as the gate does for readings that lack what it needs.
    """
    unproven = as_gate(gate, knobs).unproven(readings)
    return [name for name, reading in readings.items() if reading.interval and name in unproven]
