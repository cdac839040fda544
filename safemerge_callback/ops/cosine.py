"""The projected cosine of a LoRA update on the safety subspace, its null value, its sign, and Safe LoRA's projection.

With V = W_aligned − W_unaligned and C = V·Vᵀ/‖V‖ (Safe LoRA, arXiv:2405.16833; SafeMERGE, arXiv:2503.17239), the
cosine is ρ = ⟨C·ΔW, ΔW⟩ / (‖C·ΔW‖·‖ΔW‖). C (d_out × d_out) is never formed: two thin products with V, then r × r
Grams. ρ sees neither the adapter's scaling nor ‖V‖.

Nor does ρ see a sign: C is positive semi-definite, so ρ ≥ 0, and ΔW = -V, the safety training undone, has the ρ of V.
The papers have nothing in its place. The signed cosine ⟨V, ΔW⟩ / (‖V‖·‖ΔW‖) tells the two apart, and takes no further
product with V.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .alignment import AlignmentMatrix, Factored, Int8, rows_of, turned
from .lowrank import LowRank, accumulation_dtype, squared_norm, wide_dtype
from .shapes import Float, Tensor

# Elements widened at a time where V is stored narrower than it is multiplied: 16 MiB of float32.
_BLOCK = 1 << 22


def _slices(V: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Yield blocks of rows that cover V: all of them where it has `dtype` already, thin ones to widen otherwise."""
    rows = V.shape[-2] if V.dtype == dtype else max(1, _BLOCK // max(1, V[..., :1, :].numel()))
    for start in range(0, V.shape[-2], rows):
        yield slice(start, start + rows)


def times_transpose(V: AlignmentMatrix, B: Tensor) -> Tensor:
    """Vᵀ·B, (*n, d_in, r)."""
    if isinstance(V, Factored):
        return V.W.to(B.dtype).mT @ (V.U.to(B.dtype).mT @ B)
    if isinstance(V, Int8):
        by_row, by_column = _scales(V, B)
        return by_column.mT * times_transpose(V.Q, by_row * B)
    first, *others = _slices(V, B.dtype)
    total = rows_of(V, first, B.dtype).mT @ B[..., first, :]
    for rows in others:
        total += rows_of(V, rows, B.dtype).mT @ B[..., rows, :]
    return total


def times(V: AlignmentMatrix, T: Tensor) -> Tensor:
    """V·T, (*n, d_out, r)."""
    if isinstance(V, Factored):
        return V.U.to(T.dtype) @ (V.W.to(T.dtype) @ T)
    if isinstance(V, Int8):
        by_row, by_column = _scales(V, T)
        return by_row * times(V.Q, by_column.mT * T)
    return torch.cat([rows_of(V, rows, T.dtype) @ T for rows in _slices(V, T.dtype)], dim=-2)


def _scales(V: Int8, like: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of rows and the scale of columns, one of them 1: they go on the thin factor, so Q is only widened."""
    scale = V.scale.to(like.dtype)
    one = torch.ones_like(scale[..., :1, :1])
    return (scale, one) if V.scale.shape[-1] == 1 else (one, scale)


def unit(x: Tensor) -> Tensor:
    """Scale each matrix to largest entry 1: the cosine does not see it, and products neither over- nor underflow."""
    return _scaled(x)[0]


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each matrix with largest entry 1, and what that was, (*n, 1, 1); one of zeros stays, with 1."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    return x / largest, largest


class Cosines(NamedTuple):
    """Of each update, (*n): `projected` is ρ in [0, 1]; `along` is ⟨V, ΔW⟩/‖ΔW‖, the signed cosine times ‖V‖."""

    projected: Tensor
    along: Tensor


def projected_cosine(update: LowRank, V: AlignmentMatrix) -> Float[Tensor, "*n"]:
    """Return ρ in [0, 1] of each update against its alignment matrix, (*n), in float64; what `cosines` says of it."""
    return cosines(update, V).projected


def cosines(update: LowRank, V: AlignmentMatrix) -> Cosines:
    """Return both cosines of each update against its alignment matrix, in float64.

    With G = A·Aᵀ, T = VᵀB and S = V·T: ρ = tr(G·TᵀT) / √(tr(G·SᵀS)·tr(G·BᵀB)), and ⟨V, ΔW⟩ is the sum of T∘Aᵀ.
    A 0/0 is 1.0 for ρ: an update that is zero "has not moved", and where V is zero (or meets the update at a right
    angle in exact zeros) there is nothing to compare with. It is NaN for `along`, and so is an update or V that is not
    finite for both.
    """
    dtype = accumulation_dtype(*update)
    A, B = unit(update.A.to(dtype)).mT, unit(update.B.to(dtype))
    T, size = _scaled(times_transpose(V, B))
    S = unit(times(V, T))
    # T and S were rescaled, so take ⟨CΔW, ΔW⟩ as ⟨S·A, B·A⟩ rather than ‖T·A‖²: one scale, which cancels.
    G = gram(A, A)
    overlap = (G * gram(S, B)).sum((-2, -1))
    squared = (G * gram(B, B)).sum((-2, -1))
    norms = ((G * gram(S, S)).sum((-2, -1)) * squared).sqrt()
    rho = torch.where(norms > 0, overlap / norms, torch.ones_like(norms)).clamp(0.0, 1.0)
    wide = wide_dtype(A.device)
    along = size[..., 0, 0].to(wide) * (T.to(wide) * A.to(wide)).sum((-2, -1)) / squared.sqrt()
    return Cosines(torch.where(torch.isfinite(norms), rho, torch.full_like(rho, torch.nan)), along)


def inner(A: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """⟨x·A, y·A⟩ through r × r Grams."""
    A = A.mT
    return (gram(A, A) * gram(x, y)).sum((-2, -1))


def gram(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ·y in float64; a tensor with itself is widened once."""
    wide = wide_dtype(x.device)
    left = x.to(wide)
    return left.mT @ (left if y is x else y.to(wide))


def null_cosine(V: AlignmentMatrix) -> Float[Tensor, "*n"]:
    """Return ρ_null = ‖V‖² / (√d_out·‖V·Vᵀ‖), the cosine of an update unrelated to V, (*n), in float64.

    Not in the papers: one τ for all modules partly sorts them by this value, which depends on shape and spectrum
    alone (1/√(1 + d_out/d_in) for a flat spectrum). 1.0 where V is zero.
    """
    if isinstance(V, Factored):
        d_out, squared, gram = V.U.shape[-2], squared_norm(LowRank(V.W, V.U)), _factored_gram_norm(V)
    else:
        d_out, d_in = (V.Q if isinstance(V, Int8) else V).shape[-2:]
        squared, gram = _dense_norms(V if d_out <= d_in else turned(V))
    return torch.where(gram > 0, squared / (d_out**0.5 * gram), torch.ones_like(gram)).clamp(0.0, 1.0)


def _factored_gram_norm(V: Factored) -> Tensor:
    """‖V·Vᵀ‖ = ‖√G_U·G_W·√G_U‖ = √tr(G_U·G_W·G_U·G_W) with the Grams of both factors."""
    wide = wide_dtype(V.U.device)
    U, W = V.U.to(wide), V.W.to(wide)
    product = (U.mT @ U) @ (W @ W.mT)
    return (product * product.mT).sum((-2, -1)).clamp_min(0.0).sqrt()


def _dense_norms(V: AlignmentMatrix) -> tuple[Tensor, Tensor]:
    """‖V‖² and ‖V·Vᵀ‖ in float64, half the Gram (it is symmetric) taken by blocks, so that it is never in memory."""
    assert not isinstance(V, Factored)
    stored = V.Q if isinstance(V, Int8) else V
    dtype, wide = accumulation_dtype(stored), wide_dtype(stored.device)
    scale = _largest(V).to(dtype)
    squared = torch.zeros(stored.shape[:-2], dtype=wide, device=stored.device)
    gram = torch.zeros_like(squared)
    step = max(1, min(256, _BLOCK // max(1, stored.shape[-1])))
    for start in range(0, stored.shape[-2], step):
        rows = rows_of(V, slice(start, start + step), dtype) / scale
        squared += rows.to(wide).square().sum((-2, -1))
        product = (times(_from_row(V, start), rows.mT) / scale).to(wide).square_()
        gram += 2 * product.sum((-2, -1)) - product[..., : rows.shape[-2], :].sum((-2, -1))
    area = scale.to(wide)[..., 0, 0].square()
    return squared * area, gram.sqrt() * area


def _from_row(V: Tensor | Int8, start: int) -> Tensor | Int8:
    if isinstance(V, Tensor):
        return V[..., start:, :]
    return Int8(V.Q[..., start:, :], V.scale[..., start:, :] if V.scale.shape[-1] == 1 else V.scale)


def _largest(V: Tensor | Int8) -> Tensor:
    """A size of the entries of each matrix to divide by, (*n, 1, 1): never 0."""
    tensor, by = (V.scale, 127) if isinstance(V, Int8) else (V, 1)
    largest = by * torch.linalg.vector_norm(tensor, float("inf"), dim=(-2, -1), keepdim=True)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def project(B: Float[Tensor, "*n d_out r"], V: AlignmentMatrix) -> Float[Tensor, "*n d_out r"]:
    """Return C·B with C = V·Vᵀ/‖V‖ (Safe LoRA, arXiv:2405.16833), in float32 or float64; B where V is zero.

    C is not idempotent: applied again it scales the update again.
    """
    dtype = accumulation_dtype(B)
    if isinstance(V, Factored):
        norm = squared_norm(LowRank(V.W, V.U)).sqrt()
    elif isinstance(V, Int8):
        norms = [torch.linalg.vector_norm(rows_of(V, rows, dtype), dim=(-2, -1)) for rows in _slices(V.Q, dtype)]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    else:
        norm = torch.linalg.vector_norm(V, dim=(-2, -1), dtype=dtype)
    norm = norm.to(dtype)[..., None, None]
    B = B.to(dtype)
    return torch.where(norm > 0, times(V, times_transpose(V, B)) / norm, B)
