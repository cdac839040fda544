"""`opposed`: the modules whose update points against the safety subspace's own direction."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ...errors import SubspaceError
from ..reading import Reading, Readings
from .checks import check_z_threshold
from .common import Verdict, digits, excluded, movable
from .registry import gate


def distance(reading: Reading, z_threshold: float) -> float:
    """Return how many standard deviations the signed cosine lies above `z_threshold`; infinite where there is none."""
    return math.inf if reading.signed_z is None else reading.signed_z - z_threshold


def open_of(readings: Readings, *, z_threshold: float) -> Iterable[str]:  # noqa: ARG001  as every gate is asked
    """Return the modules that have moved: a compressed V gives no signed cosine."""
    return movable(readings)


@gate(knob="z_threshold", distance=distance, open_of=open_of)
def opposed(readings: Readings, *, z_threshold: float) -> dict[str, Verdict]:
    """Merge where the signed cosine lies below `z_threshold` standard deviations of an unrelated update's.

    The signed cosine is ⟨V, ΔW⟩/(‖V‖·‖ΔW‖); of an unrelated update it has mean 0 and standard deviation
    1/√(d_out·d_in). Below 0 the update takes back what aligned the model, which the papers' cosine does not see: it is
    the same for ΔW and -ΔW.

    Source: none. Raises SubspaceError for readings of a compressed V, which hold no signed cosine, and ConfigError for
    a `z_threshold` that is no finite number.
    """
    check_z_threshold(z_threshold)
    return {name: excluded(reading) or _compared(reading, z_threshold) for name, reading in readings.items()}


def _compared(reading: Reading, z_threshold: float) -> Verdict:
    if reading.signed_cosine is None or reading.signed_z is None:
        raise SubspaceError(
            f"gate 'opposed' needs the signed cosine, and module {reading.name!r} was read from a compressed V: give "
            "`measure` the gate, which then reads the exact file"
        )
    merge = reading.signed_z < z_threshold
    said = f"z {digits(reading.signed_z, z_threshold)} {'<' if merge else '>='} {z_threshold:g}"
    return Verdict(merge, f"{said}: signed cosine {reading.signed_cosine:+.4f}, unrelated 0")
