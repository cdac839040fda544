"""`cat`: the weighted sum of the updates without any loss, the ranks added.

Source: PEFT's `combination_type="cat"`; SafeMERGE (arXiv:2503.17239). Offline only: a live adapter keeps its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops import LowRank, weighted_sum
from .registry import Merged, register


@register(spaces=("delta",), needs=frozenset({"safety_adapter"}), keeps_rank=False, additive=("delta",), signed=True)
def cat(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
) -> Merged:
    """Return Σ wᵢ·ΔWᵢ exactly, at rank Σ rᵢ. Shapes as in `Method`; float32 or better; residual 0."""
    A, B = weighted_sum([live, *safety], weights)
    return Merged(A, B, A.new_zeros(A.shape[:-2], dtype=torch.float64))
