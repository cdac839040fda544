"""`slerp`: along the arc from one update to the other, so that the norm does not sag between them.

Source: spherical linear interpolation (Shoemake 1985), in mergekit's convention: the angle is between the flattened
updates, their norms are left as they are, and where they are nearly parallel, |cos| > 0.9995, the straight line is
taken. t = w_safety / (w_live + w_safety), as in mergekit's `nuslerp`. Differs: the result is scaled by w_live +
w_safety, 1 in mergekit, and in space `delta` the angle comes from r × r Grams.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PlanError
from ..ops import LowRank, accumulation_dtype, inner_product, refit, squared_norm, weighted_sum, wide_dtype
from .registry import Merged, register, unmoved
from .spaces import check_ranks

# Beyond this |cos| the arc is a line, and sin θ too small to divide by.
PARALLEL = 0.9995


@register(spaces=("delta", "factor"), needs=frozenset({"safety_adapter"}), several=False)
def slerp(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
) -> Merged:
    """Return (w_live + w_safety)·slerp(ΔW_live, ΔW_safety) at the live rank. Shapes as in `Method`; float32 or better.

    `delta`: exact, refitted in the live gauge. `factor`: A and B each along their own arc; ranks must agree;
    residual 0. Weights (1, 0) change nothing, to the bit. PlanError unless there is one safety adapter, or for
    weights that sum to 0.
    """
    if len(safety) != 1 or weights[0] + weights[1] == 0:
        raise PlanError(
            f"method 'slerp' goes from one update to one other, got {len(safety)} safety adapters and weights "
            f"{tuple(weights)}: give one, and weights that do not sum to 0"
        )
    still = unmoved(live, weights)
    if still is not None:
        return still
    if space == "factor":
        check_ranks(live, safety)
        return _in_factors(live, safety[0], weights)
    other = safety[0]
    near, far = _shares(inner_product(live, other), squared_norm(live), squared_norm(other), weights)
    target = weighted_sum([_times(live, near), _times(other, far)], (1.0, 1.0))
    fitted, residual = refit(live, target)
    return Merged(fitted.A, fitted.B, residual)


def _shares(inner: Tensor, live: Tensor, safety: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What each of the two is multiplied by, (*n), from their inner product and squared norms."""
    scale = weights[0] + weights[1]
    t = weights[1] / scale
    norms = (live * safety).sqrt()
    cosine = torch.where(norms > 0, inner / norms, torch.ones_like(norms)).clamp(-1.0, 1.0)
    line = cosine.abs() > PARALLEL
    angle = torch.where(line, torch.ones_like(cosine), cosine).arccos()
    angle = torch.where(line, torch.ones_like(angle), angle)
    near = torch.where(line, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    far = torch.where(line, t, torch.sin(t * angle) / torch.sin(angle))
    return scale * near, scale * far


def _times(update: LowRank, share: Tensor) -> LowRank:
    """An update times a number a module, put on B before it is rounded."""
    return LowRank(update.A, (update.B.to(share.dtype) * share[..., None, None]).to(accumulation_dtype(*update)))


def _in_factors(live: LowRank, other: LowRank, weights: Sequence[float]) -> Merged:
    """Each factor along its own arc; √(w_live + w_safety) on both gives the product the whole scale."""
    root = (weights[0] + weights[1]) ** 0.5
    halves = [w / root for w in weights]
    dtype = accumulation_dtype(*live, *other)
    wide, merged = wide_dtype(live.A.device), []
    for x, y in zip(live, other, strict=True):
        wide_x, wide_y = x.to(wide), y.to(wide)
        inner, square_x, square_y = (
            (p * q).sum((-2, -1)) for p, q in ((wide_x, wide_y), (wide_x, wide_x), (wide_y, wide_y))
        )
        near, far = _shares(inner, square_x, square_y, halves)
        merged.append((near[..., None, None] * wide_x + far[..., None, None] * wide_y).to(dtype))
    return Merged(merged[0], merged[1], merged[0].new_zeros(inner.shape, dtype=torch.float64))
