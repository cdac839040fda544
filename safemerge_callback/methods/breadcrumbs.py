"""`breadcrumbs`: of each update neither the largest nor the smallest entries, then their weighted sum.

Source: Model Breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795). Differs: the share of outliers dropped at the
top (β in the paper, mergekit's `gamma`) is fixed at 1 %; the density is the share that is kept, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops import LowRank, band_mask
from .density import DENSITY, needed_density
from .registry import Merged, register
from .spaces import each, merge_entries, weighted

# The share of entries, the largest of each matrix, that are taken for outliers.
OUTLIERS = 0.01


@register(
    spaces=("delta", "factor"),
    needs=frozenset({"safety_adapter"}),
    dense=True,
    signed=True,
    knobs=(DENSITY,),
)
def breadcrumbs(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
    density: float | None = None,
) -> Merged:
    """Return Σ wᵢ·band(ΔWᵢ) at the live rank. Shapes and spaces as in `merge_entries`; ConfigError without density."""
    share = needed_density("breadcrumbs", density)

    def combine(stack: Tensor, scaled: Sequence[float]) -> Tensor:
        return weighted(each(stack, lambda matrix: matrix * band_mask(matrix, share, OUTLIERS)), scaled).sum(0)

    return merge_entries(space, live, safety, weights, combine)
