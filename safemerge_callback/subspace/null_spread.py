"""The spread of the null cosine at ranks and in an orientation that the header does not hold."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

# The header's spreads are drawn, each to about 10 %, so a variance to 20 %: a difference says nothing below a fifth.
_DRAWN = 0.2


def spread_at(rank: int, drawn: Mapping[str, float]) -> float:
    """Return the standard deviation at `rank`, from `drawn`: rank, as text -> standard deviation; not empty.

    A line in log-log between the ranks drawn: the variance is a mean over the columns of B, so it falls near rank^-1.
    Below the lowest and above the highest rank exactly so. 0 where a neighbour is 0.
    """
    known = sorted((int(text), value) for text, value in drawn.items())
    at = bisect_left([r for r, _ in known], rank)
    if at < len(known) and known[at][0] == rank:
        return known[at][1]
    if at in (0, len(known)):
        nearest, value = known[min(at, len(known) - 1)]
        return value * math.sqrt(nearest / rank)
    (low, one), (high, other) = known[at - 1], known[at]
    if one <= 0 or other <= 0:
        return 0.0
    share = math.log(rank / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(one) + share * math.log(other))


def turned_spread(spread: float, null: float, turned_null: float, rank: int, shape: tuple[int, int]) -> float:
    """Return the standard deviation for Vᵀ in place of V, which is `shape` = (rows, columns) and has `spread`.

    With d_out the longer side, ρ is what it is for the shorter one times the share of ‖ΔW‖ that lies inside V's range,
    and the two are independent. The square of that share is a Beta variable of a Gaussian update: its relative variance
    is 2/rank times the difference of 1/shorter and 1/longer, to first order, whatever V's rank; a root quarters it.
    The rank is what A's Gram matrix leaves of it, tr(G)²/tr(G²), which is less where d_in is not much larger.
    """
    if null <= 0:
        return 0.0
    rows, columns = shape
    before, after = (rank * d_in / (d_in + rank + 1) for d_in in (columns, rows))
    relative = (spread / null) ** 2 * before / after
    turned = relative + (1 / rows - 1 / columns) / (2 * after)
    return turned_null * math.sqrt(max(turned, _DRAWN * relative))
