"""`calibrated`: the cosine in units of what an unrelated update's cosine would be in that module."""

from __future__ import annotations

import math

from ...errors import SubspaceError
from ..reading import Reading, Readings
from .checks import check_z_threshold
from .common import Verdict, below, digits, excluded, proof
from .registry import gate


def limit(reading: Reading, z_threshold: float) -> float:
    """Return the cosine below which z is below `z_threshold`; -inf where null_std is 0. SubspaceError without one."""
    spread = _spread(reading)
    return reading.null_cosine + z_threshold * spread if spread > 0 else -math.inf


@gate(knob="z_threshold", limit=limit, notes=("null_std",))
def calibrated(readings: Readings, *, z_threshold: float) -> dict[str, Verdict]:
    """Merge where z = (ρ - null_cosine)/null_std < z_threshold, for the adapter's rank and the module's orientation.

    null_cosine and null_std are mean and standard deviation of the cosine of a Gaussian update of that shape and rank,
    so one z means the same in a wide module and in a tall one, as one cosine does not. A module whose null_std is 0 (a
    V whose singular values are all equal: every update has the same cosine) is not merged.

    Source: none. Raises SubspaceError where the subspace file says nothing of null_std, and ConfigError for a
    `z_threshold` that is no finite number.
    """
    check_z_threshold(z_threshold)
    for reading in readings.values():
        # A module that has not moved will: what is missing shows before the first step.
        _spread(reading)
    return {name: excluded(reading) or _compared(reading, z_threshold) for name, reading in readings.items()}


def _compared(reading: Reading, z_threshold: float) -> Verdict:
    spread = _spread(reading)
    if spread == 0:
        return Verdict(False, f"every update has the cosine {reading.null_cosine:.4f} here: nothing to calibrate by")
    sign = below(reading, limit(reading, z_threshold))
    z = digits((reading.cosine - reading.null_cosine) / spread, z_threshold)
    known = f"cosine {reading.cosine:.4f}, unrelated {reading.null_cosine:.4f} ± {spread:.4f}"
    return Verdict(sign == "<", f"z {z} {sign} {z_threshold:g}: {known}{proof(reading)}")


def _spread(reading: Reading) -> float:
    if reading.null_std is None and reading.comparable:
        raise SubspaceError(
            f"gate 'calibrated' needs the spread of the null cosine, and the subspace file has none (null_std) for "
            f"module {reading.name!r}: build the subspace again with `safemerge build`, or choose gate 'threshold'."
        )
    return reading.null_std or 0.0
