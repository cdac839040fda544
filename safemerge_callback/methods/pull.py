"""`pull`: a proximal step, a share of the way toward the safety adapter's update, or toward the aligned model.

ΔW ← argmin_X ½‖X - ΔW‖² + μ/2·‖X - ΔW_target‖² = (1 - λ)·ΔW + λ·ΔW_target, with λ = μ/(1 + μ) the strength.
Source: L2-SP (Li et al. 2018, arXiv:1802.01483), a penalty on the distance from the weights that a fine-tune began
with, here as its proximal step. Differs: only in the modules that the gate selects, only at checks, and not through
the optimizer. The aligned model is ΔW_target = 0. Toward a safety adapter this is `linear` with weights that sum to 1,
and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PlanError
from ..ops import LowRank, accumulation_dtype
from .linear import linear
from .registry import Merged, register


@register(
    spaces=("delta",),
    needs=frozenset(),
    optional=frozenset({"safety_adapter"}),
    additive=("delta",),
    several=False,
    strength=0.2,
)
def pull(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float | Tensor],
) -> Merged:
    """Return w_live·ΔW + w_target·ΔW_target at the live rank, as `linear`. Shapes as in `Method`; float32 or better.

    Without a safety adapter A is untouched, B is multiplied by w_live and the residual is 0. PlanError for more than
    one.
    """
    if len(safety) > 1:
        raise PlanError(f"method 'pull' goes toward one adapter, got {len(safety)}: give one, or use 'linear'")
    if safety:
        return linear(live, safety, weights=weights)
    dtype, w = accumulation_dtype(*live), weights[0]
    share = w[..., None, None].to(dtype) if isinstance(w, Tensor) else w
    A = live.A.to(dtype)
    return Merged(A, share * live.B.to(dtype), A.new_zeros(A.shape[:-2], dtype=torch.float64))
