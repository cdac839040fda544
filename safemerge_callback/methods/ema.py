"""`ema`: toward the exponential moving average of the run's own updates. It needs no safety data.

ΔW ← (1 - λ)·ΔW + λ·E with the strength λ, and E ← d·E + (1 - d)·ΔW every few optimizer steps, E = 0 (the aligned model)
before the first.
Source: Polyak averaging (Polyak and Juditsky 1992) in its exponential form; where the average moves only at the steps
at which it is put back whole, it is Lookahead (Zhang et al. 2019, arXiv:1907.08610) with its alpha 1 - d. Differs:
the average is of the updates B·A, held at low rank, and not of A and of B, whose product would be something else.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops import LowRank
from .linear import linear
from .registry import Merged, register


@register(spaces=("delta",), needs=frozenset({"average"}), additive=("delta",), several=False, strength=1.0)
def ema(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float | Tensor],
) -> Merged:
    """Return w_live·ΔW + w_average·E at the live rank, as `linear`; E stands in the place of a safety update."""
    return linear(live, safety, weights=weights)
