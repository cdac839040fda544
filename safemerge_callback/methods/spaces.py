"""Where a method that works entry by entry is at work: on the factors, or on the updates that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import PlanError
from ..ops import LowRank, accumulation_dtype, refit_dense
from .registry import Merged, unmoved

# From k matrices (*n, rows, columns), stacked on the first dimension, and k weights to one matrix (*n, rows, columns).
Combine = Callable[[Tensor, Sequence[float]], Tensor]


def merge_entries(
    space: str, live: LowRank, safety: Sequence[LowRank], weights: Sequence[float], combine: Combine
) -> Merged:
    """Return `combine` of the factors or of the updates, at the live rank. Shapes as in `Method`; float32 or better.

    `factor`: A and B are combined separately, the A's first, with √|w| on each and the sign on A; ranks must agree;
    residual 0, since nothing is truncated. `delta`: forms all k updates, d_out × d_in each, and refits the result in
    the live gauge (`refit_dense`). Weights (1, 0, ...) leave the live factors as they are, to the bit.

    Source: PEFT 0.21, `_generalized_task_arithmetic_weighted_adapter` and its `_svd` form. Differs: PEFT combines A and
    B as they are and puts the adapters' scalings into the weights; here they are in the live adapter's units already,
    which is the same wherever the scalings agree.
    """
    still = unmoved(live, weights)
    if still is not None:
        return still
    updates = [live, *safety]
    dtype = accumulation_dtype(*(t for update in updates for t in update))
    if space == "factor":
        check_ranks(live, safety)
        return _in_factors(updates, weights, combine, dtype)
    deltas = torch.stack([update.B.to(dtype) @ update.A.to(dtype) for update in updates])
    fitted, residual = refit_dense(live, combine(deltas, weights))
    return Merged(fitted.A, fitted.B, residual)


def weighted(matrices: Tensor, weights: Sequence[float]) -> Tensor:
    """Return each of k stacked matrices times its weight, (k, *n, rows, columns)."""
    shape = (-1,) + (1,) * (matrices.dim() - 1)
    return matrices * torch.tensor(weights, dtype=matrices.dtype, device=matrices.device).view(shape)


def each(matrices: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `change` of each of k stacked matrices, in their order, stacked again."""
    return torch.stack([change(matrix) for matrix in matrices])


def check_ranks(live: LowRank, safety: Sequence[LowRank]) -> None:
    """Raise PlanError unless all ranks agree, as adding the factors asks for."""
    ranks = [update.A.shape[-2] for update in (live, *safety)]
    if len(set(ranks)) > 1:
        raise PlanError(
            f"space 'factor' adds the factors, so ranks must agree, got {ranks}: use space 'delta' or 'aligned_factor'"
        )


def _in_factors(updates: Sequence[LowRank], weights: Sequence[float], combine: Combine, dtype: torch.dtype) -> Merged:
    """PEFT's arithmetic; a negative weight's sign goes on A alone, or it would cancel in the product."""
    roots = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    A = combine(torch.stack([u.A.to(dtype) for u in updates]), signed)
    B = combine(torch.stack([u.B.to(dtype) for u in updates]), roots)
    return Merged(A, B, A.new_zeros(A.shape[:-2], dtype=torch.float64))
