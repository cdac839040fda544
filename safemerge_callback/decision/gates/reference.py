"""`reference`: the safety adapter's own cosine is the measure of what a safe update has in that module."""

from __future__ import annotations

import math

from ...errors import ConfigError
from ..reading import Reading, Readings
from .checks import check_reference_fraction
from .common import Verdict, below, digits, excluded, proof
from .registry import gate


def limit(reading: Reading, reference_fraction: float) -> float:
    """Return the cosine below which a module is merged; -inf where the safety adapter has not moved."""
    safety_cosine = _safety_cosine(reading)
    return reference_fraction * safety_cosine if math.isfinite(safety_cosine) else -math.inf


@gate(
    knob="reference_fraction",
    needs=frozenset({"safety_adapter", "safety_cosines"}),
    limit=limit,
    notes=("reference",),
)
def reference(readings: Readings, *, reference_fraction: float) -> dict[str, Verdict]:
    """Merge where ρ < reference_fraction·ρ_safety, ρ_safety being the safety adapter's cosine in that module.

    A module that the safety adapter has not moved is not merged: there is nothing to compare with, nor to merge.

    Source: none. Raises ConfigError for readings without ρ_safety (`measure` takes them as `reference`) and for a
    fraction outside (0, 1].
    """
    check_reference_fraction(reference_fraction)
    for reading in readings.values():
        # A module that has not moved will: what is missing shows before the first step.
        _safety_cosine(reading)
    return {name: excluded(reading) or _compared(reading, reference_fraction) for name, reading in readings.items()}


def _compared(reading: Reading, fraction: float) -> Verdict:
    safety_cosine = _safety_cosine(reading)
    if not math.isfinite(safety_cosine):
        return Verdict(False, "nothing to compare with: the safety adapter has not moved here")
    bound = limit(reading, fraction)
    sign = below(reading, bound)
    share = f"{fraction:g} of the safety adapter's {safety_cosine:.4f}"
    words = f"cosine {digits(reading.cosine, bound)} {sign} {bound:.4f}, {share}"
    return Verdict(sign == "<", words + proof(reading))


def _safety_cosine(reading: Reading) -> float:
    if reading.reference is None:
        raise ConfigError(
            f"gate 'reference' compares with the safety adapter's own cosines, and there is none for module "
            f"{reading.name!r}: give `measure` reference=own_cosines(safety, factors, subspace)"
        )
    return reading.reference
