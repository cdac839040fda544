"""The projected cosine where V is only known to within an error: an interval that holds it.

V = V̂ + E, of which the file has V̂, e ≥ ‖E‖₂ and c ≥ ‖V̂·Eᵀ‖₂. With X = ΔW, x = ‖X‖, t̂ = ‖V̂ᵀX‖ and p̂ = ‖V̂V̂ᵀX‖,
ρ = n / (p·x) where n = ‖VᵀX‖² and p = ‖VVᵀX‖:

- ‖VᵀX‖ is within e·x of t̂, so n lies in [(t̂ − e·x)₊², (t̂ + e·x)²];
- n = t̂² + 2⟨X, V̂EᵀX⟩ + ‖EᵀX‖² as well, so n lies in [t̂² − 2c·x², t̂² + 2c·x² + e²·x²];
- VVᵀX = V̂V̂ᵀX + V̂EᵀX + EV̂ᵀX + EEᵀX, so p is within c·x + min(c·x, e·t̂) + e²·x of p̂;
- ⟨VVᵀX, X⟩ = n, so p ≥ n/x (Cauchy-Schwarz).

A truncated SVD has c = 0 and e = the next singular value; in general c ≤ ‖V̂‖₂·e.

Rounding: e and c are proven bounds, what floating point adds to the thin products is allowed for but not proven. With
ε the machine epsilon of their dtype and x̃ = Σₖ‖bₖ‖‖aₖ‖ ≥ x the size of the update before anything cancels, e·x is
widened by 2ε·‖V‖·x̃ and c·x by 2ε·‖V‖²·x̃, which is above what blocked products lose, and the ends by 128·ε (1.5e-5
in float32), which is above what the measure of an exact V loses. ‖V‖ stands for ‖V̂‖ there, so where e is no small part
of ‖V‖ both are widened by what V̂ may be larger, (1 + e/‖V‖) and its square.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .alignment import AlignmentMatrix
from .cosine import inner, times, times_transpose, unit
from .lowrank import LowRank, accumulation_dtype
from .shapes import Float, Tensor

_PRODUCT = 2
_ENDS = 128


class Known(NamedTuple):
    """What is known of V beside V̂, each (*n): e ≥ ‖V − V̂‖₂, c ≥ ‖V̂·(V − V̂)ᵀ‖₂ and ‖V‖ > 0 (Frobenius)."""

    error: Tensor
    cross: Tensor
    norm: Tensor


class _Sizes(NamedTuple):
    """Norms of one batch, each (*n), with V scaled to norm 1: x, t̂ and p̂, and e·x and c·x with their rounding."""

    update: Tensor
    once: Tensor
    twice: Tensor
    error: Tensor
    cross: Tensor


def cosine_interval(update: LowRank, V: AlignmentMatrix, known: Known) -> Float[Tensor, "*n 3"]:
    """Return (ρ̂, lower, upper) of each update, (*n, 3): lower ≤ ρ ≤ upper for the V that `V` approximates.

    float64 (float32 on MPS). An update of zero gives 1, 1, 1 ("has not moved"), one that is not finite NaN. Where
    nothing can be said it is 0 to 1.
    """
    sizes = _sizes(update, V, known)
    x, t, p, _, _ = sizes
    low, high = _overlap(sizes)
    shortest, longest = _length(sizes, low)
    rho = torch.where(p > 0, t * t / (p * x), torch.ones_like(p))
    ends = _ENDS * torch.finfo(accumulation_dtype(*update)).eps
    lower = low / (longest * x) - ends
    upper = torch.where(shortest > 0, high / (shortest * x), torch.ones_like(x)) + ends
    interval = torch.stack([rho, lower, upper], dim=-1).clamp(0.0, 1.0)
    interval = torch.where((x > 0)[..., None], interval, torch.ones_like(interval))
    finite = torch.isfinite(x) & torch.isfinite(p)
    return torch.where(finite[..., None], interval, torch.full_like(interval, torch.nan))


def _sizes(update: LowRank, V: AlignmentMatrix, known: Known) -> _Sizes:
    dtype = accumulation_dtype(*update)
    A, B = unit(update.A.to(dtype)), unit(update.B.to(dtype))
    norm = known.norm.to(dtype)[..., None, None]
    T = times_transpose(V, B) / norm
    S = times(V, T) / norm
    x, t, p = (inner(A, y, y).clamp_min(0.0).sqrt() for y in (B, T, S))
    whole = (torch.linalg.vector_norm(A, dim=-1) * torch.linalg.vector_norm(B, dim=-2)).sum(-1).to(x.dtype)
    noise = _PRODUCT * torch.finfo(dtype).eps * whole
    unit_norm = known.norm.to(x.dtype)
    error, cross = known.error.to(x.dtype) / unit_norm, known.cross.to(x.dtype) / unit_norm.square()
    larger = 1 + error
    return _Sizes(x, t, p, error * x + noise * larger, cross * x + noise * larger.square())


def _overlap(sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """The bounds on n = ‖VᵀX‖²: the better of both on either side."""
    x, t, _, error, cross = sizes
    low = torch.maximum((t - error).clamp_min(0.0).square(), t.square() - 2 * x * cross)
    high = torch.minimum((t + error).square(), t.square() + 2 * x * cross + error.square())
    return low.clamp_min(0.0), high


def _length(sizes: _Sizes, low: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds on p = ‖VVᵀX‖, given the lower one on n."""
    x, t, p, error, cross = sizes
    spread = cross + torch.minimum(cross, error * t / x) + error.square() / x
    return torch.maximum(p - spread, low / x), p + spread
