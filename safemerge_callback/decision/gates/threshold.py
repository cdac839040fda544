"""`threshold`: one cosine for all modules."""

from __future__ import annotations

from ..reading import Reading, Readings
from .checks import check_threshold
from .common import Verdict, below, digits, excluded, proof
from .registry import gate


def limit(_reading: Reading, threshold: float) -> float:
    """Return the cosine below which a module is merged: the threshold itself."""
    return threshold


@gate(knob="threshold", limit=limit, most=1.0)
def threshold(readings: Readings, *, threshold: float) -> dict[str, Verdict]:
    """Merge where cosine < threshold, strictly and unrounded.

    Source: SafeMERGE, arXiv:2503.17239. Differs: Safe LoRA, arXiv:2405.16833, has ≤; a module that has not moved, or
    that has nothing to compare with, is never merged. ConfigError for a `threshold` outside [0, 1].
    """
    check_threshold(threshold)
    return {name: excluded(reading) or _compared(reading, threshold) for name, reading in readings.items()}


def _compared(reading: Reading, threshold: float) -> Verdict:
    sign = below(reading, threshold)
    words = f"cosine {digits(reading.cosine, threshold)} {sign} {threshold:g}{proof(reading)}"
    return Verdict(sign == "<", words)
