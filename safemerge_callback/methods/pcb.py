"""`pcb`: a mean in which each entry of each update weighs as much as it matters and is agreed with.

Source: PCB-Merging (Du et al. 2024, arXiv:2410.02396): for each of N updates,
    intra = Softmax(N·Norm(ΔW ∘ ΔW)), inter = Σⱼ Softmax(Norm(ΔW ∘ ΔWⱼ)), balance = intra ∘ inter;
only the `density` largest balances of each update stay, and the result is Σ balanceᵢ ∘ wᵢ·ΔWᵢ / Σ balanceᵢ.
Differs: Norm is min-max, over one matrix and not over the whole model; the paper's evolutionary search for the
weights is left out. Parity is with these equations, not with the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import LowRank, balances, trimmed
from .density import DENSITY, needed_density
from .registry import Merged, register
from .spaces import each, merge_entries, weighted


@register(
    spaces=("delta", "factor"),
    needs=frozenset({"safety_adapter"}),
    dense=True,
    knobs=(DENSITY,),
)
def pcb(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
    density: float | None = None,
) -> Merged:
    """Return the balanced mean of wᵢ·ΔWᵢ at the live rank. Shapes and spaces as in `merge_entries`.

    The balances sum to 1 at an entry, so that weights of 1 give a mean. ConfigError for a density that is missing or
    outside (0, 1].
    """
    share = needed_density("pcb", density)

    def combine(stack: Tensor, scaled: Sequence[float]) -> Tensor:
        balance = balances(stack)
        kept = each(balance, lambda matrix: trimmed(matrix, share))
        total = kept.sum(0)
        mixed = (kept * weighted(stack, scaled)).sum(0)
        return torch.where(total > 0, mixed / total, torch.zeros_like(total))

    return merge_entries(space, live, safety, weights, combine)
