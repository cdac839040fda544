"""`ties`: trim each update, elect a sign at every entry, take the mean of those that have it.

Source: TIES-Merging (Yadav et al. 2023, arXiv:2306.01708), in PEFT's convention, `combination_type="ties"` (its
`_svd` form: space `delta`).
Differs from mergekit, where the weighted updates vote, and whose `normalize` divides by the sum of the weights: here
the mean is over a count, so that weights of 1 give the mean and (0.8, 0.2) about half of it.
Differs from PEFT: at least one entry is kept, and weights (1, 0) change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops import LowRank, disjoint_mean, elected, trimmed
from .density import DENSITY, MAJORITY_SIGN, needed_density
from .registry import Merged, register
from .spaces import each, merge_entries, weighted


@register(
    spaces=("delta", "factor"),
    needs=frozenset({"safety_adapter"}),
    dense=True,
    knobs=(DENSITY, MAJORITY_SIGN),
)
def ties(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Merged:
    """Return the disjoint mean of wᵢ·trim(ΔWᵢ) at the live rank. Shapes and spaces as in `merge_entries`.

    ConfigError for a density that is missing or outside (0, 1].
    """
    share = needed_density("ties", density)

    def combine(stack: Tensor, scaled: Sequence[float]) -> Tensor:
        kept = each(stack, lambda matrix: trimmed(matrix, share))
        return disjoint_mean(weighted(kept, scaled), elected(kept, majority_sign_method))

    return merge_entries(space, live, safety, weights, combine)
