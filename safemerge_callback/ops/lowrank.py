"""Arithmetic on low-rank updates B·A that never forms the d_out × d_in product.

Shapes: `*n` is any batch of modules of one shape, possibly empty. Sums are stacked in float32 or better. All else is
computed in float64 (float32 on devices that have none) and rounded once, at the end: thin QR and products in float32
lose more than that rounding does, and trainings that differ by rounding drift further apart at a merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .krylov import Products, leading_triplets
from .shapes import Float, Tensor

# The shorter side of a dense matrix up to which all of it is decomposed: about a second on one core.
EXACT_UP_TO = 1024


class LowRank(NamedTuple):
    """An update B·A: `A` is (*n, r, d_in), `B` is (*n, d_out, r)."""

    A: Tensor
    B: Tensor


class _Spectrum(NamedTuple):
    """The singular triplets of a factored matrix: (*n, d_out, k), (*n, k) and (*n, k, d_in)."""

    left: Tensor
    values: Tensor
    right: Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of r × r arithmetic on `device`: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def inner_product(x: LowRank, y: LowRank) -> Float[Tensor, "*n"]:
    """Return ⟨B_x·A_x, B_y·A_y⟩ = Σ (B_xᵀB_y) ∘ (A_xA_yᵀ), (*n), in float64."""
    wide = wide_dtype(x.A.device)
    on_b = x.B.to(wide).mT @ y.B.to(wide)
    on_a = x.A.to(wide) @ y.A.to(wide).mT
    return (on_b * on_a).sum((-2, -1))


def squared_norm(update: LowRank) -> Float[Tensor, "*n"]:
    """Return ‖B·A‖² (Frobenius), (*n), in float64; never negative."""
    return inner_product(update, update).clamp_min(0.0)


def weighted_sum(updates: Sequence[LowRank], weights: Sequence[float | Tensor]) -> LowRank:
    """Return Σ wᵢ·Bᵢ·Aᵢ without loss: factors stacked, so the ranks add. The weight goes on B.

    All updates share d_out, d_in and the batch; their ranks may differ. A weight is one number for the batch or a
    tensor of one a module, (*n). float32 or float64.
    """
    dtype = accumulation_dtype(*(t for update in updates for t in update))
    A = torch.cat([update.A.to(dtype) for update in updates], dim=-2)
    B = torch.cat([_scaled(update.B.to(dtype), w) for update, w in zip(updates, weights, strict=True)], dim=-1)
    return LowRank(A, B)


def _scaled(B: Tensor, weight: float | Tensor) -> Tensor:
    return B * (weight[..., None, None].to(B.dtype) if isinstance(weight, Tensor) else weight)


def _spectrum(update: LowRank) -> _Spectrum:
    wide = wide_dtype(update.A.device)
    q_b, r_b = torch.linalg.qr(update.B.to(wide))
    q_a, r_a = torch.linalg.qr(update.A.to(wide).mT)
    u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return _Spectrum(q_b @ u, s, v @ q_a.mT)


def _rounded(A: Tensor, B: Tensor, like: LowRank) -> LowRank:
    dtype = accumulation_dtype(*like)
    return LowRank(A.to(dtype), B.to(dtype))


def _residual(values: Tensor, rank: int) -> Tensor:
    """‖dropped singular values‖ / ‖all‖; 0 where the matrix is 0."""
    total = torch.linalg.vector_norm(values, dim=-1)
    dropped = torch.linalg.vector_norm(values[..., rank:], dim=-1)
    return torch.where(total > 0, dropped / total, torch.zeros_like(total))


def truncate(update: LowRank, rank: int) -> tuple[LowRank, Float[Tensor, "*n"]]:
    """Return the best rank-`rank` approximation of B·A (Eckart-Young) and its relative residual, (*n).

    Equals the truncated SVD of the dense matrix (PEFT's `svd` combination): thin QR of both factors, then an SVD of
    the core. Factors are balanced, B = U√S and A = √S·Vᵀ, and padded with zeros where fewer than `rank` values exist.
    """
    left, values, right = _spectrum(update)
    k = min(rank, values.shape[-1])
    root = values[..., :k].sqrt()
    pad = rank - k
    B = torch.nn.functional.pad(left[..., :k] * root[..., None, :], (0, pad))
    A = torch.nn.functional.pad(right[..., :k, :] * root[..., :, None], (0, 0, 0, pad))
    return _rounded(A, B, update), _residual(values, rank)


def _gram_roots(A: Tensor) -> tuple[Tensor, Tensor]:
    """(A·Aᵀ)^½ and its inverse, (*n, r, r); eigenvalues are floored so that dependent rows stay invertible."""
    wide = A.to(wide_dtype(A.device))
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    top = values[..., -1:]
    floor = torch.where(top > 0, top * 1e-12, torch.ones_like(top))
    root = values.clamp_min(floor).sqrt()
    scaled = vectors * root[..., None, :]
    return scaled @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT


def refit(live: LowRank, target: LowRank) -> tuple[LowRank, Float[Tensor, "*n"]]:
    """Return the best approximation of `target` at the live rank, in the live factors' gauge, and its residual.

    B·A = (B·Q)(Q⁻¹·A) for every invertible Q, and Adam's moments describe the live (B, A): of all optimal pairs take
    the one whose A has the live A's Gram matrix, (A·Aᵀ), turned as little as possible from the live A (orthogonal
    Procrustes). Where `target` equals the live update this is the live pair, up to rounding.

    Alternating least squares from the live pair reach the same product in the limit; this reaches it at once, and
    stays as well-conditioned as the live A even where the target's row space is far from it. Both factors are in
    float32, float64 where a live one is: `target` in float64 is not rounded before.
    """
    spectrum = _spectrum(target)
    return _in_gauge(live, spectrum), _residual(spectrum.values, live.A.shape[-2])


def refit_dense(live: LowRank, target: Float[Tensor, "*n d_out d_in"]) -> tuple[LowRank, Float[Tensor, "*n"]]:
    """Return what `refit` does for a target that has no factors: an entrywise mask leaves a matrix of full rank.

    Where the shorter side is at most 1024, exact (Eckart-Young) by the full singular value decomposition in the dtype
    of `target`, float32 or float64, which equals PEFT's `_svd` combinations at `svd_rank` = live rank. Beyond that the
    leading triplets alone (`leading_triplets`, its precision is said there).
    """
    rank = live.A.shape[-2]
    if min(target.shape[-2:]) <= EXACT_UP_TO:
        left, values, right = torch.linalg.svd(target, full_matrices=False)
        values = values.to(wide_dtype(values.device))
        return _in_gauge(live, _Spectrum(left, values, right)), _residual(values, rank)
    return refit_products(live, target, torch.linalg.vector_norm(target, dim=(-2, -1), dtype=wide_dtype(target.device)))


def refit_products(
    live: LowRank, target: Float[Tensor, "*n d_out d_in"] | Products, norm: Float[Tensor, "*n"]
) -> tuple[LowRank, Float[Tensor, "*n"]]:
    """Return what `refit_dense` does, by its leading triplets, for a target that is only multiplied with.

    `norm`: its Frobenius norm, (*n), in float64.
    """
    left, values, right = leading_triplets(target, live.A.shape[-2])
    values = values.to(norm.dtype)
    # Not the norm of a difference, which would be one more matrix: what the kept values leave of the whole.
    dropped = (norm.square() - values.square().sum(-1)).clamp_min(0.0).sqrt()
    residual = torch.where(norm > 0, dropped / norm, torch.zeros_like(norm))
    return _in_gauge(live, _Spectrum(left, values, right)), residual


def _in_gauge(live: LowRank, spectrum: _Spectrum) -> LowRank:
    left, values, right = spectrum
    k = min(live.A.shape[-2], values.shape[-1])
    left, kept, right = left[..., :k], values[..., :k], right[..., :k, :]
    root, inverse_root = _gram_roots(live.A)
    overlap = live.A.to(root.dtype) @ right.to(root.dtype).mT
    u, _, v = torch.linalg.svd(root @ overlap, full_matrices=False)
    turn = u @ v
    B = left.to(root.dtype) @ (kept[..., :, None] * (turn.mT @ inverse_root))
    return _rounded(root @ turn @ right.to(root.dtype), B, live)


def column_space(update: LowRank, tolerance: float = 1e-6) -> Float[Tensor, "*n d_out k"]:
    """Return an orthonormal basis of the column space of B·A, k ≤ r, in float64; columns are zero beyond its rank.

    Thin QR of both factors, then an SVD of the core, so that it is the product's space in whatever gauge it is
    written. A direction counts where its singular value exceeds `tolerance` times the largest.
    """
    left, values, _ = _spectrum(update)
    counts = (values > tolerance * values[..., :1]).to(left.dtype)
    return left * counts[..., None, :]


def all_finite(*tensors: Tensor) -> bool:
    """Return whether no tensor holds NaN or infinities; waits for the device."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
