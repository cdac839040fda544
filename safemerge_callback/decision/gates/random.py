"""`random`: the control arm: as many modules as another gate would take, but drawn, not read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from ..reading import Readings
from .checks import check_num_layers
from .common import Verdict, by_cosine, check_count, excluded, movable, straddles
from .registry import gate
from .threshold import threshold as threshold_gate


def asks(*, num_layers: int | None, **_others: Any) -> bool:
    """Return whether a cosine counts: only those of gate `threshold`, of which as many are drawn."""
    return num_layers is None


def open_of(readings: Readings, *, threshold: float, num_layers: int | None, **_others: Any) -> Iterable[str]:
    """Return the modules that gate `threshold` may or may not take: how many are drawn is how many that takes."""
    moved = movable(readings) if num_layers is None else {}
    return [name for name, reading in moved.items() if straddles(reading, threshold)]


@gate(open_of=open_of, asks=asks)
def random(readings: Readings, *, threshold: float, num_layers: int | None, seed: int, step: int) -> dict[str, Verdict]:
    """Merge as many modules as gate `threshold` would, or `num_layers` of them, drawn from those that have moved.

    The same on every rank and after a resume: a pure function of the seed, the optimizer step and the names.

    Source: the control that arXiv:2505.14185 asks for. ConfigError as gates `threshold` and `num_layers`.
    """
    if num_layers is None:
        count = sum(v.merge for v in threshold_gate(readings, threshold=threshold).values())
        of = f"as many as lie below {threshold:g}"
    else:
        check_num_layers(num_layers)
        check_count(num_layers, readings)
        count, of = num_layers, f"as num_layers={num_layers} asks"
    candidates = by_cosine(readings)
    taken = drawn(candidates, count, seed, step)
    words = f"{len(taken)} of {len(candidates)} by lot, {of}"
    return {
        name: excluded(reading) or Verdict(name in taken, f"{'drawn' if name in taken else 'not drawn'}: {words}")
        for name, reading in readings.items()
    }


def drawn(names: Iterable[str], count: int, seed: int, step: int) -> set[str]:
    """Return `count` of `names`, or all where there are fewer: those of lowest keyed hash, in which no order shows."""

    def lot(name: str) -> bytes:
        return hashlib.blake2b(f"gate random, {seed}, {step}, {name}".encode(), digest_size=16).digest()

    return set(sorted(names, key=lot)[:count])
