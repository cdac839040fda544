"""`linear`: the weighted sum of the updates.

Source: SafeMERGE, arXiv:2503.17239 (ΔW ← w_f·ΔW_f + w_s·ΔW_s); factor space: PEFT's `combination_type="linear"`.
Differs: the released SafeMERGE merges A and B separately as PEFT does, which adds the cross terms √(w_f·w_s)·(B_f·A_s +
B_s·A_f) to the equation; that is `space="factor"` here. The default, `space="delta"`, is the equation itself, truncated
to the live rank in the best way there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import LowRank, refit, weighted_sum, wide_dtype
from .registry import Merged, register
from .spaces import merge_entries, weighted


@register(spaces=("delta", "factor"), needs=frozenset({"safety_adapter"}), additive=("delta",), signed=True)
def linear(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float | Tensor],
    space: str = "delta",
) -> Merged:
    """Return Σ wᵢ·ΔWᵢ at the live rank. Shapes as in `Method`; float32 or better.

    `delta`: exact sum, refitted in the live gauge, in float64 and rounded once; a module that the sum leaves as it was
    keeps both factors to the bit, and a weight may be a tensor of one number a module, (*n).
    `factor`: (Σ √|wᵢ|·Bᵢ)(Σ ±√|wᵢ|·Aᵢ) as PEFT does it; ranks must agree; residual 0, since nothing is truncated.
    """
    if space == "factor":
        weighed = [float(weight) for weight in weights]
        return merge_entries(space, live, safety, weighed, lambda stack, scaled: weighted(stack, scaled).sum(0))
    # Widened before the weights, so that the factors are rounded once.
    wide = wide_dtype(live.A.device)
    whole = [LowRank(update.A.to(wide), update.B.to(wide)) for update in (live, *safety)]
    fitted, residual = refit(live, weighted_sum(whole, weights))
    still = _unchanged(live, safety, weights)
    kept = still[..., None, None]
    return Merged(
        torch.where(kept, live.A.to(fitted.A.dtype), fitted.A),
        torch.where(kept, live.B.to(fitted.B.dtype), fitted.B),
        torch.where(still, torch.zeros_like(residual), residual),
    )


def _unchanged(live: LowRank, safety: Sequence[LowRank], weights: Sequence[float | Tensor]) -> Tensor:
    """Which modules of the batch the sum leaves as they were, (*n): w_live = 1 and every other term exactly zero."""
    n, device = live.A.shape[:-2], live.A.device
    still = torch.as_tensor(weights[0] == 1.0, device=device).expand(n)
    for update, weight in zip(safety, weights[1:], strict=True):
        nothing = (update.A == 0).all(-1).all(-1) | (update.B == 0).all(-1).all(-1)
        still = still & (nothing | torch.as_tensor(weight == 0.0, device=device))
    return still
