"""What a merge would do, by r × r arithmetic in a small space where nothing is lost; apart: it knows no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...methods import How
from ...ops import LowRank, inner_product, squared_norm, weighted_sum, wide_dtype


class MergeEffect(NamedTuple):
    """What a merge does to modules, in squared norms: tensors of (n), float64, or numbers of one module.

    Of the old and the new update, their inner product, the distance between them, the target, and what the target's
    truncation dropped.
    """

    old: Any
    new: Any
    inner: Any
    distance: Any
    target: Any
    dropped: Any


def in_core(updates: Sequence[LowRank]) -> list[LowRank]:
    """Return updates of one shape and batch as updates of R × R, R = Σ rᵢ: (*n, rᵢ, R) and (*n, R, rᵢ), float64.

    With all A's stacked and all B's side by side, A = (A·Aᵀ)^½·Qₐ and B = Q_b·(BᵀB)^½, where both Q are orthonormal:
    each sum, product and singular value of the updates is that of the roots. d_out and d_in are met once, in the
    Grams. Good to about 1e-8 of the largest update: the root of a Gram matrix halves the digits.
    """
    wide = wide_dtype(updates[0].A.device)
    A = torch.cat([update.A.to(wide) for update in updates], dim=-2)
    B = torch.cat([update.B.to(wide) for update in updates], dim=-1)
    root_a, root_b = _root(A @ A.mT), _root(B.mT @ B)
    sizes = [update.A.shape[-2] for update in updates]
    return [LowRank(*pair) for pair in zip(root_a.split(sizes, -2), root_b.split(sizes, -1), strict=True)]


def _root(gram: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0.0).sqrt()[..., None, :]) @ vectors.mT


def fits_core(how: How) -> bool:
    """Return whether a merge sees updates only up to a rotation of their spaces: not entry by entry, nor against V."""
    return not how.kind.dense and not how.needs & {"subspace", "average", "grams"}


def core_effect(how: How, live: LowRank, safety: Sequence[LowRank], scaling: Tensor) -> MergeEffect:
    """Return what a merge would do to n modules given by their cores, times `scaling`², (n).

    The factors that come back are those of the real merge, rotated.
    """
    merged = how.merge(live, safety)
    return merge_effect(live, LowRank(merged.A, merged.B), merged.residual, scaling)


def merge_effect(old: LowRank, new: LowRank, residual: Tensor, scaling: Tensor) -> MergeEffect:
    """Return the squares of a merge that was made: `residual` is ‖dropped‖/‖target‖, (n), `scaling` (n).

    A best approximation is at a right angle to what it drops, so ‖target‖² = ‖new‖² / (1 - residual²).
    """
    unit = scaling.square()
    before, after = squared_norm(old) * unit, squared_norm(new) * unit
    share = residual.to(after.dtype).square()
    target = torch.where(share < 1, after / (1 - share).clamp_min(1e-300), after)
    distance = squared_norm(weighted_sum([new, old], (1.0, -1.0))) * unit
    return MergeEffect(before, after, inner_product(new, old) * unit, distance, target, share * target)
