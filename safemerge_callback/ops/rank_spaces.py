"""Rank spaces aligned: of all factor pairs of an update, the one whose rank directions fit those of another update.

B·A = (B·Q)(Q⁻¹·A) for every invertible Q, so factors of two adapters may be added only where their r directions
correspond; training gives no reason that they do. Here each update is first written in balanced factors, B = U√S and
A = √S·Vᵀ, which leaves an orthogonal Q open, and that is found by Procrustes.
Source: MuDSC, Xu et al. 2024, arXiv:2403.01753, which matches units by permutation on a weighted sum of similarities in
weights and in activations. Differs: LoRAs of one base have their inputs and outputs in common, so that only the rank
directions are free, and these by any rotation, not by permutation alone; no rounds over layers, and no labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .lowrank import LowRank, truncate, wide_dtype
from .shapes import Float, Tensor


def rank_similarity(
    other: LowRank, target: LowRank, inputs: Float[Tensor, "*n t d_in"] | None = None, weight_share: float = 0.5
) -> Float[Tensor, "*n r r"]:
    """Return how alike the rank directions of `other`, by row, and of `target`, by column, are; equal ranks.

    In weights S_w = B_otherᵀ·B_target + A_other·A_targetᵀ. Where `inputs` of the module are given, one row a token, in
    activations too, S_a = A_other·XᵀX·A_targetᵀ: weight_share·S_w/‖S_w‖ + (1 - weight_share)·S_a/‖S_a‖. Nothing d_in ×
    d_in is formed.
    """
    in_weights = other.B.mT @ target.B + other.A @ target.A.mT
    if inputs is None:
        return in_weights
    X = inputs.to(target.A.dtype)
    in_activations = (X @ other.A.mT).mT @ (X @ target.A.mT)
    return weight_share * _unit(in_weights) + (1.0 - weight_share) * _unit(in_activations)


def aligned_ranks(
    updates: Sequence[LowRank], inputs: Float[Tensor, "*n t d_in"] | None = None, weight_share: float = 0.5
) -> list[LowRank]:
    """Return the same updates in balanced factors of one rank, whose rank directions fit each other.

    The rank is the largest of theirs; lower ones get directions of zeros. The first of that rank is the target, the
    first of all where ranks agree: each other one takes of all orthogonal Q that of the largest tr(Qᵀ·S), S its
    `rank_similarity` (Procrustes: Q = U·Vᵀ of S = U·Σ·Vᵀ). The products are what they were, and the pairs depend on the
    products alone, up to one rotation of all of them where singular values of the target are equal, and to Q in
    directions in which S is singular. float64, as `wide_dtype`.
    """
    ranks = [update.A.shape[-2] for update in updates]
    first = ranks.index(max(ranks))
    balanced = [_balanced(update, max(ranks)) for update in updates]
    target = balanced[first]
    return [
        pair if place == first else _rotated(pair, rank_similarity(pair, target, inputs, weight_share))
        for place, pair in enumerate(balanced)
    ]


def _unit(matrix: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return torch.where(norm > 0, matrix / norm, torch.zeros_like(matrix))


def _balanced(update: LowRank, rank: int) -> LowRank:
    wide = wide_dtype(update.A.device)
    return truncate(LowRank(update.A.to(wide), update.B.to(wide)), rank)[0]


def _rotated(pair: LowRank, similarity: Tensor) -> LowRank:
    left, _, right = torch.linalg.svd(similarity)
    turn = left @ right
    return LowRank(turn.mT @ pair.A, pair.B @ turn)
