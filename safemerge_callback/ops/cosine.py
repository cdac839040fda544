"""The projected cosine of a LoRA update on the safety subspace, its null value, and Safe LoRA's projection.

With V = W_aligned − W_unaligned and C = V·Vᵀ/‖V‖ (Safe LoRA, arXiv:2405.16833; SafeMERGE, arXiv:2503.17239), the
cosine is ρ = ⟨C·ΔW, ΔW⟩ / (‖C·ΔW‖·‖ΔW‖). C (d_out × d_out) is never formed: two thin products with V, then r × r
Grams. ρ sees neither the adapter's scaling nor ‖V‖.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .lowrank import LowRank, accumulation_dtype, squared_norm, wide_dtype
from .shapes import Float, Tensor

# Elements widened at a time where V is stored narrower than it is multiplied: 16 MiB of float32.
_BLOCK = 1 << 22


class Factored(NamedTuple):
    """An alignment matrix V = U·W of rank k: `U` is (*n, d_out, k), `W` is (*n, k, d_in)."""

    U: Tensor
    W: Tensor


AlignmentMatrix = Tensor | Factored


def _row_blocks(V: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield V by blocks of rows in `dtype`: the whole of V where it has that dtype already, thin copies otherwise."""
    rows = V.shape[-2] if V.dtype == dtype else max(1, _BLOCK // max(1, V[..., :1, :].numel()))
    for start in range(0, V.shape[-2], rows):
        block = slice(start, start + rows)
        yield block, V[..., block, :].to(dtype)


def _times_transpose(V: AlignmentMatrix, B: Tensor) -> Tensor:
    """Vᵀ·B, (*n, d_in, r)."""
    if isinstance(V, Factored):
        return V.W.to(B.dtype).mT @ (V.U.to(B.dtype).mT @ B)
    parts = [block.mT @ B[..., rows, :] for rows, block in _row_blocks(V, B.dtype)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _times(V: AlignmentMatrix, T: Tensor) -> Tensor:
    """V·T, (*n, d_out, r)."""
    if isinstance(V, Factored):
        return V.U.to(T.dtype) @ (V.W.to(T.dtype) @ T)
    return torch.cat([block @ T for _, block in _row_blocks(V, T.dtype)], dim=-2)


def _unit(x: Tensor) -> Tensor:
    """Scale each matrix to largest entry 1: the cosine does not see it, and products neither over- nor underflow."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, x / largest, x)


def projected_cosine(update: LowRank, V: AlignmentMatrix) -> Float[Tensor, "*n"]:
    """Return ρ in [0, 1] of each update against its alignment matrix, (*n), in float64.

    With G = A·Aᵀ, T = VᵀB and S = V·T: ρ = tr(G·TᵀT) / √(tr(G·SᵀS)·tr(G·BᵀB)).
    A 0/0 is 1.0: an update that is zero "has not moved", and where V is zero (or meets the update at a right angle in
    exact zeros) there is nothing to compare with. An update or V that is not finite gives NaN.
    """
    dtype = accumulation_dtype(*update)
    A, B = _unit(update.A.to(dtype)), _unit(update.B.to(dtype))
    T = _unit(_times_transpose(V, B))
    S = _unit(_times(V, T))
    # T and S were rescaled, so take ⟨CΔW, ΔW⟩ as ⟨S·A, B·A⟩ rather than ‖T·A‖²: one scale, which cancels.
    overlap = _inner(A, S, B)
    norms = (_inner(A, S, S) * _inner(A, B, B)).sqrt()
    rho = torch.where(norms > 0, overlap / norms, torch.ones_like(norms)).clamp(0.0, 1.0)
    return torch.where(torch.isfinite(norms), rho, torch.full_like(rho, torch.nan))


def _inner(A: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """⟨x·A, y·A⟩ through r × r Grams."""
    wide = wide_dtype(A.device)
    A, x, y = A.to(wide), x.to(wide), y.to(wide)
    return ((A @ A.mT) * (x.mT @ y)).sum((-2, -1))


def null_cosine(V: AlignmentMatrix) -> Float[Tensor, "*n"]:
    """Return ρ_null = ‖V‖² / (√d_out·‖V·Vᵀ‖), the cosine of an update unrelated to V, (*n), in float64.

    Not in the papers: one τ for all modules partly sorts them by this value, which depends on shape and spectrum
    alone (1/√(1 + d_out/d_in) for a flat spectrum). 1.0 where V is zero.
    """
    if isinstance(V, Factored):
        d_out, squared, gram = V.U.shape[-2], squared_norm(LowRank(V.W, V.U)), _factored_gram_norm(V)
    else:
        d_out = V.shape[-2]
        squared, gram = _dense_norms(V if V.shape[-2] <= V.shape[-1] else V.mT)
    return torch.where(gram > 0, squared / (d_out**0.5 * gram), torch.ones_like(gram)).clamp(0.0, 1.0)


def _factored_gram_norm(V: Factored) -> Tensor:
    """‖V·Vᵀ‖ = ‖√G_U·G_W·√G_U‖ = √tr(G_U·G_W·G_U·G_W) with the Grams of both factors."""
    wide = wide_dtype(V.U.device)
    U, W = V.U.to(wide), V.W.to(wide)
    product = (U.mT @ U) @ (W @ W.mT)
    return (product * product.mT).sum((-2, -1)).clamp_min(0.0).sqrt()


def _dense_norms(V: Tensor) -> tuple[Tensor, Tensor]:
    """‖V‖² and ‖V·Vᵀ‖ in float64, the Gram taken by blocks of rows so that it is never whole in memory."""
    dtype, wide = accumulation_dtype(V), wide_dtype(V.device)
    largest = torch.linalg.vector_norm(V, float("inf"), dim=(-2, -1), keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest)).to(dtype)
    squared = torch.zeros(V.shape[:-2], dtype=wide, device=V.device)
    gram = torch.zeros_like(squared)
    step = max(1, min(256, _BLOCK // max(1, V.shape[-1])))
    for start in range(0, V.shape[-2], step):
        rows = V[..., start : start + step, :].to(dtype) / scale
        squared += rows.to(wide).square().sum((-2, -1))
        gram += (_times(V, rows.mT) / scale).to(wide).square().sum((-2, -1))
    unit = scale.to(wide)[..., 0, 0].square()
    return squared * unit, gram.sqrt() * unit


def project(B: Float[Tensor, "*n d_out r"], V: AlignmentMatrix) -> Float[Tensor, "*n d_out r"]:
    """Return C·B with C = V·Vᵀ/‖V‖ (Safe LoRA, arXiv:2405.16833), in float32 or float64; B where V is zero.

    C is not idempotent: applied again it scales the update again.
    """
    dtype = accumulation_dtype(B)
    if isinstance(V, Factored):
        norm = squared_norm(LowRank(V.W, V.U)).sqrt()
    else:
        norm = torch.linalg.vector_norm(V, dim=(-2, -1), dtype=dtype)
    norm = norm.to(dtype)[..., None, None]
    B = B.to(dtype)
    return torch.where(norm > 0, _times(V, _times_transpose(V, B)) / norm, B)
