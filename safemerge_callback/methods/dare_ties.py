"""`dare_ties`: drop entries of each update by chance, rescale the rest, then elect signs as TIES does.

Source: DARE (Yu et al. 2023, arXiv:2311.03099) with the election of TIES (arXiv:2306.01708), in PEFT's convention,
`combination_type="dare_ties"` (its `_svd` form: space `delta`). Differs as `dare_linear` and `ties` do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import LowRank, disjoint_mean, dropped, elected
from .density import DENSITY, MAJORITY_SIGN, needed_density
from .registry import Merged, needed_generator, register
from .spaces import each, merge_entries, weighted


@register(
    spaces=("delta", "factor"),
    needs=frozenset({"safety_adapter"}),
    dense=True,
    knobs=(DENSITY, MAJORITY_SIGN),
)
def dare_ties(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> Merged:
    """Return the disjoint mean of wᵢ·mask(ΔWᵢ)/density at the live rank. Spaces and masks as in `dare_linear`.

    ConfigError for a density that is missing or outside (0, 1], PlanError for no generator.
    """
    share, source = needed_density("dare_ties", density), needed_generator("dare_ties", generator)

    def combine(stack: Tensor, scaled: Sequence[float]) -> Tensor:
        kept = each(stack, lambda matrix: dropped(matrix, share, source))
        return disjoint_mean(weighted(kept, scaled), elected(kept, majority_sign_method))

    return merge_entries(space, live, safety, weights, combine)
