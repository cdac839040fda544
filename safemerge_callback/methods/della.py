"""`della`: drop entries by chance, small ones sooner, rescale each by its own odds, then elect signs.

Source: DELLA-Merging (Deep et al. 2024, arXiv:2406.11617): MagPrune, elect, fuse. An entry is kept with a probability
linear in the rank of its magnitude within its row, and divided by that probability.
Differs: the width of the range of probabilities (the paper's ε, a knob there) is fixed, 0.2 where the density has room
for it; the election is PEFT's (`ties`), in which unweighted updates vote.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import LowRank, bernoulli_mask, disjoint_mean, elected, keep_probabilities
from .density import DENSITY, MAJORITY_SIGN, needed_density
from .registry import Merged, needed_generator, register
from .spaces import each, merge_entries, weighted

# From the lowest probability to be kept to the highest.
WINDOW = 0.2


@register(
    spaces=("delta", "factor"),
    needs=frozenset({"safety_adapter"}),
    dense=True,
    knobs=(DENSITY, MAJORITY_SIGN),
)
def della(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> Merged:
    """Return the disjoint mean of wᵢ·magprune(ΔWᵢ) at the live rank. Shapes and spaces as in `merge_entries`.

    Masks are drawn in the order of `dare_linear`. ConfigError for a density that is missing or outside (0, 1],
    PlanError for no generator.
    """
    share, source = needed_density("della", density), needed_generator("della", generator)
    # Probabilities stay in (0, 1], half the density at the least: dividing by less would blow single entries up.
    window = min(WINDOW, 2 * (1 - share), share)

    def thinned(matrix: Tensor) -> Tensor:
        odds = keep_probabilities(matrix, share, window)
        return matrix * bernoulli_mask(odds, source) / odds

    def combine(stack: Tensor, scaled: Sequence[float]) -> Tensor:
        kept = each(stack, thinned)
        return disjoint_mean(weighted(kept, scaled), elected(kept, majority_sign_method))

    return merge_entries(space, live, safety, weights, combine)
