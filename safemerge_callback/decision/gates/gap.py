"""`gap`: where the sorted readings fall apart into two groups, the lower one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from ..reading import Readings
from .common import Verdict, by_cosine, excluded, lowest, movable
from .registry import gate

# Of two modules one is always below the only gap there is: that says nothing of either.
FEWEST = 3


def open_of(readings: Readings) -> Iterable[str]:
    """Return all modules, or none where the largest gap is where it is whatever the cosines are.

    The i-th lowest cosine lies between the i-th lowest lower end and the i-th lowest upper end, so the gap above it is
    at least one difference of those and at most another. Where one gap is at least more than any other is at most, it
    is the largest; and no interval reaches across it, since it is more than 0.
    """
    moved = movable(readings)
    if len(moved) < FEWEST:
        return ()
    lowers, uppers = sorted(r.lower for r in moved.values()), sorted(r.upper for r in moved.values())
    least = [low - high for low, high in zip(lowers[1:], uppers[:-1], strict=True)]
    most = [high - low for high, low in zip(uppers[1:], lowers[:-1], strict=True)]
    widest = max(range(len(least)), key=least.__getitem__)
    others = max(value for i, value in enumerate(most) if i != widest)
    return () if least[widest] > max(others, 0.0) else moved


@gate(ranked=True, open_of=open_of)
def gap(readings: Readings) -> dict[str, Verdict]:
    """Merge the modules below the largest gap between neighbours in the sorted cosines; no knob.

    Of equally large gaps the lowest counts, so that fewer are merged. Nothing is merged where fewer than 3 modules have
    moved, or where all cosines are equal. The gap is always somewhere: look at the readings before you trust it.

    Source: none.
    """
    cosines = [readings[name].cosine for name in by_cosine(readings)]
    gaps = [high - low for low, high in pairwise(cosines)]
    if len(cosines) < FEWEST:
        kept = Verdict(False, f"{len(cosines)} modules have moved: a gap needs {FEWEST}")
    elif max(gaps) == 0:
        kept = Verdict(False, "all cosines are equal: there is no gap")
    else:
        at = gaps.index(max(gaps))
        edges = f"the largest gap ({cosines[at]:.4f} to {cosines[at + 1]:.4f})"
        return lowest(readings, at + 1, lambda c: f"{'below' if c else 'above'} {edges}")
    return {name: excluded(reading) or kept for name, reading in readings.items()}
