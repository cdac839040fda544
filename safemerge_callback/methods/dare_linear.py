"""`dare_linear`: drop entries of each update by chance, rescale what is left, then the weighted sum.

Source: DARE (Yu et al. 2023, arXiv:2311.03099), in PEFT's convention, `combination_type="dare_linear"` (its `_svd`
form: space `delta`). SafeMERGE (arXiv:2503.17239) releases it at density 0.5 in factor space. Differs: masks come from
a generator that is passed in and not from torch's own, and weights (1, 0) change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import LowRank, dropped
from .density import DENSITY, needed_density
from .registry import Merged, needed_generator, register
from .spaces import each, merge_entries, weighted


@register(
    spaces=("delta", "factor"),
    needs=frozenset({"safety_adapter"}),
    dense=True,
    signed=True,
    knobs=(DENSITY,),
)
def dare_linear(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> Merged:
    """Return Σ wᵢ·mask(ΔWᵢ)/density at the live rank. Shapes and spaces as in `merge_entries`.

    Masks are drawn adapter by adapter, in factor space first for all A's and then for all B's, as PEFT draws them;
    none is drawn at density 1. ConfigError for a density that is missing or outside (0, 1], PlanError for no generator.
    """
    share, source = needed_density("dare_linear", density), needed_generator("dare_linear", generator)

    def combine(stack: Tensor, scaled: Sequence[float]) -> Tensor:
        return weighted(each(stack, lambda matrix: dropped(matrix, share, source)), scaled).sum(0)

    return merge_entries(space, live, safety, weights, combine)
