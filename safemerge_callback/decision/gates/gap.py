"""`gap`: where the sorted readings fall apart into two groups, the lower one."""

from __future__ import annotations

from itertools import pairwise

from ..reading import Readings
from .common import Verdict, by_cosine, excluded, lowest

# Of two modules one is always below the only gap there is: that says nothing of either.
FEWEST = 3


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
