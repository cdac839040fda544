"""Readings in, one verdict a module out, each with its reason. A gate is a function; its name is its name in YAML."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..errors import ConfigError, nearest
from .reading import Reading, Readings


class Verdict(NamedTuple):
    """Whether to merge a module, and why, in words."""

    merge: bool
    reason: str


def threshold(readings: Readings, *, threshold: float) -> dict[str, Verdict]:
    """Merge where cosine < threshold, strictly and unrounded.

    Source: SafeMERGE, arXiv:2503.17239. Differs: Safe LoRA, arXiv:2405.16833, has ≤; a module that has not moved, or
    that has nothing to compare with, is never merged.
    """
    check_threshold(threshold)
    return {name: excluded(reading) or _compared(reading, threshold) for name, reading in readings.items()}


def _compared(reading: Reading, threshold: float) -> Verdict:
    below = reading.cosine < threshold
    proof = f" (certified: {reading.proof})" if reading.interval else " (re-read)" if reading.reread else ""
    return Verdict(below, f"cosine {_digits(reading.cosine, threshold)} {'<' if below else '>='} {threshold:g}{proof}")


def _digits(cosine: float, threshold: float) -> str:
    """Four digits, or all of them where four would read as the threshold itself."""
    short = f"{cosine:.4f}"
    return short if float(short) != round(threshold, 4) else repr(cosine)


def num_layers(readings: Readings, *, num_layers: int) -> dict[str, Verdict]:
    """Merge the `num_layers` modules of lowest cosine, ties by name.

    Source: Safe LoRA, arXiv:2405.16833, which calls it the number of layers to project. Differs: chosen from one
    measurement, before anything is edited; modules that have not moved are not chosen, so fewer may be.
    """
    check_num_layers(num_layers)
    if num_layers > len(readings):
        raise ConfigError(f"num_layers={num_layers} is more than the {len(readings)} LoRA modules there are: lower it")
    left_out = {name: excluded(reading) for name, reading in readings.items()}
    order = sorted(
        (name for name in readings if left_out[name] is None), key=lambda name: (readings[name].cosine, name)
    )
    rank = {name: position for position, name in enumerate(order, 1)}
    return {name: left_out[name] or _ranked(rank[name], len(order), num_layers) for name in readings}


def _ranked(position: int, of: int, num_layers: int) -> Verdict:
    chosen = position <= num_layers
    words = "among" if chosen else "not among"
    return Verdict(chosen, f"number {position} of {of} by cosine, {words} the {num_layers} lowest")


def all_modules(readings: Readings) -> dict[str, Verdict]:
    """Merge every module whose update is finite, moved or not (RESTA, arXiv:2402.11746, has no gate)."""
    return {name: _not_finite(reading) or Verdict(True, "gate all") for name, reading in readings.items()}


def watch(readings: Readings) -> dict[str, Verdict]:
    """Merge nothing: readings are for the record."""
    return {name: _not_finite(reading) or Verdict(False, "gate watch") for name, reading in readings.items()}


GATES: dict[str, Callable[..., dict[str, Verdict]]] = {
    "threshold": threshold,
    "num_layers": num_layers,
    "all": all_modules,
    "watch": watch,
}


def _not_finite(reading: Reading) -> Verdict | None:
    return None if reading.finite else Verdict(False, "update is not finite (NaN or infinite)")


def excluded(reading: Reading) -> Verdict | None:
    """Return the verdict on a module that no cosine decides, else None."""
    if not reading.finite:
        return _not_finite(reading)
    if not reading.comparable:
        return Verdict(False, "nothing to compare with: aligned and unaligned are equal here")
    return Verdict(False, "has not moved") if reading.update_norm == 0 else None


def check_gate(gate: str, threshold: float, num_layers: int | None) -> None:
    """Raise ConfigError for an unknown gate, or for a `threshold` or `num_layers` that it cannot use."""
    if gate not in GATES:
        raise ConfigError(f"gate {gate!r} is unknown: choose one of {sorted(GATES)}{nearest(str(gate), GATES)}")
    check_threshold(threshold)
    if gate == "num_layers":
        check_num_layers(num_layers)
    elif num_layers is not None:
        raise ConfigError(f"num_layers={num_layers} is read by gate 'num_layers' only, and gate is {gate!r}: drop one")


def check_threshold(threshold: float) -> None:
    """Raise ConfigError unless `threshold` is a number in [0, 1]."""
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and math.isfinite(threshold)
    if not number or not 0 <= threshold <= 1:
        raise ConfigError(f"threshold={threshold!r}: cosines lie in [0, 1], so give a number from 0 to 1")


def check_num_layers(num_layers: int | None) -> None:
    """Raise ConfigError unless `num_layers` is a whole number of at least 1."""
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
        raise ConfigError(f"num_layers={num_layers!r}: gate 'num_layers' needs a whole number of modules, 1 or more")
