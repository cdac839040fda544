"""`magnitude_prune`: of each update the largest entries, then their weighted sum.

Source: PEFT's `combination_type="magnitude_prune"` (its `_svd` form: space `delta`); the trim is that of TIES (Yadav et
al. 2023, arXiv:2306.01708). Differs: at least one entry is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops import LowRank, trimmed
from .density import DENSITY, needed_density
from .registry import Merged, register
from .spaces import each, merge_entries, weighted


@register(
    spaces=("delta", "factor"),
    needs=frozenset({"safety_adapter"}),
    dense=True,
    signed=True,
    knobs=(DENSITY,),
)
def magnitude_prune(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
    density: float | None = None,
) -> Merged:
    """Return Σ wᵢ·trim(ΔWᵢ) at the live rank. Shapes and spaces as in `merge_entries`; ConfigError without density."""
    share = needed_density("magnitude_prune", density)

    def combine(stack: Tensor, scaled: Sequence[float]) -> Tensor:
        return weighted(each(stack, lambda matrix: trimmed(matrix, share)), scaled).sum(0)

    return merge_entries(space, live, safety, weights, combine)
