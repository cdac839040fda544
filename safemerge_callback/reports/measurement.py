"""One measurement as text or as JSON."""

from __future__ import annotations

import json
import math

from ..decision import BAND, Readings
from ..io.printable import printable


def readings_text(readings: Readings, threshold: float | None) -> str:
    """Return the readings as a table, and beneath it the modules whose cosine is below `threshold`."""
    if threshold is None:
        return str(readings)
    below = readings.below(threshold)
    return "\n".join(
        [str(readings), f"{len(below)} of {len(readings)} modules below {threshold:g}", *map(printable, below)]
    )


def readings_json(readings: Readings, threshold: float | None) -> str:
    """Return the readings as JSON; NaN becomes null, which JSON has a word for."""
    modules = [
        {
            "name": name,
            "moved": reading.moved,
            "cosine": _finite(reading.cosine),
            "null_cosine": _finite(reading.null_cosine),
            "signed_cosine": reading.signed_cosine,
            "signed_z": reading.signed_z,
            "update_norm": _finite(reading.update_norm),
            "rank": reading.rank,
            "shape": list(reading.shape),
        }
        for name, reading in readings.items()
    ]
    limits = {} if threshold is None else {"threshold": threshold, "below": readings.below(threshold)}
    lead = {"moved_mean": readings.moved_mean, "moved_edge": BAND.edge}
    return json.dumps({**lead, **limits, "modules": modules}, indent=2, allow_nan=False)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
