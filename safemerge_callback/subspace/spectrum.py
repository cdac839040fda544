"""What a module's header says of V's spectrum: null cosine and its spread, energy by rank; and V's factors if few."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import Factored, null_cosine, wide_dtype
from .blocks import row_blocks

# Columns of the sketch: rank 64 twice over, so that a draw of 64 of them still varies.
SAMPLES = 128
ADAPTER_RANKS = (4, 8, 16, 32, 64)
ENERGY_RANKS = (1, 2, 4, 8, 16, 32, 64)
# Matrices whose shorter side is no longer have their exact null cosine in the header.
EXACT_UP_TO = 1024
# Columns that the rest is estimated from: on 2048 equal singular values one standard error is 0.2 %.
PROBES = 64
_SEED = 0
_DRAWS = 128
_ROUNDING = 2e-6
# From this many columns per row of A on, its Gram is normal to within what so many draws can tell.
_WIDE = 8
# The header's spreads are drawn, each to about 10 %, so a variance to 20 %: a difference says nothing below a fifth.
_DRAWN = 0.2
# Factors of V are looked for up to this rank, to this share of ‖V‖.
MAX_RANK = 64
TOLERANCE = 1e-5
# Below this share of ‖V‖ captured, the residual is far above TOLERANCE whatever the rounding.
_CAPTURED = 0.999


class Spectrum(NamedTuple):
    """What the header notes of V: norm, null_cosine, null_std and energy, as in `ModuleHeader`.

    null_cosine is exact up to `EXACT_UP_TO`, estimated where V is larger.
    """

    norm: float
    null_cosine: float
    null_std: dict[str, float]
    energy: dict[str, float]


class Sketch(NamedTuple):
    """Two thin products with V (rows, columns), from a Gaussian B (rows, SAMPLES): T = Vᵀ·B = Q·R and Y = V·Q.

    Q: (columns, m) and orthonormal, Y: (rows, m), both in V's dtype, m <= SAMPLES. V ≈ Y·Qᵀ where V has low rank.
    grams: BᵀB, TᵀT and SᵀS with S = V·T = Y·R, (3, SAMPLES, SAMPLES), float64 on the CPU, each up to a factor.
    """

    Q: Tensor
    Y: Tensor
    grams: Tensor


def spectrum_of(V: Tensor, norm: float, sketch: Sketch) -> Spectrum:
    """Return the spectrum of V (float32 or float64) with ‖V‖ = `norm`, not 0, given its sketch."""
    null = float(null_cosine(V)) if min(V.shape) <= EXACT_UP_TO else estimated_null_cosine(V, norm, sketch)
    return Spectrum(norm, null, _null_std(sketch.grams, V.shape[1]), _energy(sketch.Y, norm))


def estimated_null_cosine(V: Tensor, norm: float, sketch: Sketch) -> float:
    """Return the null cosine of V (float32 or float64) with ‖V‖ = `norm`, to a fraction of a percent, given its sketch.

    Source: Hutch++, Meyer, Musco, Musco and Woodruff (arXiv:2010.09649), for tr((VᵀV)²) = ‖V·Vᵀ‖²: exact on the span of
    the sketch's Q, estimated from Gaussian columns on what is left. Differs: the seed is fixed. Three thin products in
    place of a product of V with itself.
    """
    wide = wide_dtype(V.device)
    generator = torch.Generator().manual_seed(_SEED + 1)
    probes = torch.randn(V.shape[1], PROBES, generator=generator, dtype=torch.float32).to(V.device, V.dtype)
    outside = V @ (probes - sketch.Q @ (sketch.Q.mT @ probes))
    products = (V.mT @ (torch.cat([sketch.Y, outside], dim=1) / norm)).to(wide) / norm
    inside, rest = products.square().sum(0).split([sketch.Y.shape[1], PROBES])
    return min(1.0, float((V.shape[0] * (inside.sum() + rest.mean())) ** -0.5))


def factored_spectrum(V: Factored, norm: float) -> Spectrum:
    """Return the same of V = U·W; its energy is exact."""
    wide = wide_dtype(V.U.device)
    U, W = V.U.to(wide), V.W.to(wide) / norm
    B = _gaussian(U.shape[0]).to(wide).to(U.device)
    T = W.mT @ (U.mT @ B)
    grams = _grams(B, T, U @ (W @ T))
    values = torch.linalg.svdvals(torch.linalg.qr(U).R @ torch.linalg.qr(W.mT).R.mT)
    return Spectrum(norm, float(null_cosine(V)), _null_std(grams, W.shape[1]), _shares(values.double().cpu().square()))


def sketch_of(V: Tensor, norm: float) -> Sketch:
    """Return the sketch of V (float32 or float64) with ‖V‖ = `norm`, not 0; always the same for the same V.

    Source: randomised range finder, Halko, Martinsson and Tropp (arXiv:0909.4061), algorithm 4.1, on Vᵀ.
    """
    wide = wide_dtype(V.device)
    B = _gaussian(V.shape[0]).to(V.device)
    T = (V.mT @ (B / norm).to(V.dtype)).to(wide)
    Q, R = torch.linalg.qr(T)
    Q = Q.to(V.dtype)
    Y = V @ Q
    S = Y.to(wide) / norm @ R
    return Sketch(Q, Y, _grams(B.to(wide), T, S))


def _gaussian(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, SAMPLES, generator=generator, dtype=torch.float32)


def _grams(*factors: Tensor) -> Tensor:
    return torch.stack([(x.mT @ x).double().cpu() for x in factors])


def _energy(Y: Tensor, norm: float) -> dict[str, float]:
    """Shares of the singular values of Y = V·Q. Q's columns are orthonormal: none exceeds V's in its place."""
    wide = Y.to(wide_dtype(Y.device)) / norm
    return _shares(torch.linalg.eigvalsh(wide.mT @ wide).double().cpu().flip(0).clamp_min(0))


def _shares(values: Tensor) -> dict[str, float]:
    total = values.cumsum(0).clamp_max(1.0).tolist()
    shares = {str(rank): total[min(rank, len(total)) - 1] for rank in ENERGY_RANKS}
    # Rounded down, so that float32 products leave it a lower bound.
    return {rank: max(0, math.floor((share - _ROUNDING) * 1e6)) / 1e6 for rank, share in shares.items()}


def _null_std(grams: Tensor, columns: int) -> dict[str, float]:
    """Return {rank: standard deviation of the cosine of an update unrelated to V}, where d_in is `columns`.

    Monte Carlo at a fixed seed over Gaussian updates B·A. Each draw takes a rank's number of the sketch's columns as B,
    and the Gram of a fresh A. Drawn without replacement from SAMPLES columns, draws of B differ less than independent
    ones, by the factor 1 - rank/SAMPLES in variance, which is divided out; the part that A brings is taken apart by two
    A for each B, and has no such factor.
    """
    return {str(rank): _std(grams, rank, columns) for rank in ADAPTER_RANKS}


def _std(grams: Tensor, rank: int, columns: int) -> float:
    chosen, on_a = _draws(rank, columns)
    cosines = _cosine(on_a, grams[:, None, chosen[:, :, None], chosen[:, None, :]])
    from_a = (cosines[0] - cosines[1]).square().mean() / 2
    from_b = (cosines.var(1).mean() - from_a).clamp_min(0) / (1 - rank / SAMPLES)
    return float((from_a + from_b).sqrt())


def _cosine(on_a: Tensor, on_b: Tensor) -> Tensor:
    """tr(G·TᵀT) / √(tr(G·SᵀS)·tr(G·BᵀB)) of each draw, (2, _DRAWS)."""
    squared, overlap, projected = (on_b * on_a).sum((-2, -1))
    return overlap / (projected * squared).sqrt()


# Two widths of module at all ranks: 22 MiB.
@lru_cache(maxsize=2 * len(ADAPTER_RANKS))
def _draws(rank: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which columns of the sketch make B, (_DRAWS, rank), and A·Aᵀ/columns of two A each, (2, _DRAWS, rank, rank).

    A is a Gaussian (rank, columns); where it is wide, its Gram is drawn as a normal matrix of the same two moments.
    """
    generator = torch.Generator().manual_seed(_SEED)
    chosen = torch.rand(_DRAWS, SAMPLES, generator=generator, dtype=torch.float32).argsort(1)[:, :rank]
    if columns < _WIDE * rank:
        A = torch.randn(2, _DRAWS, rank, columns, generator=generator, dtype=torch.float32)
        return chosen, (A @ A.mT).double() / columns
    noise = torch.randn(2, _DRAWS, rank, rank, generator=generator, dtype=torch.float64)
    return chosen, torch.eye(rank, dtype=torch.float64) + (noise + noise.mT) / math.sqrt(2 * columns)


def spread_at(rank: int, drawn: Mapping[str, float]) -> float:
    """Return the standard deviation at `rank`, from `drawn`: rank, as text -> standard deviation; not empty.

    A line in log-log between the ranks drawn: the variance is a mean over the columns of B, so it falls near rank^-1.
    Below the lowest and above the highest rank exactly so. 0 where a neighbour is 0.
    """
    known = sorted((int(text), value) for text, value in drawn.items())
    at = bisect_left([r for r, _ in known], rank)
    if at < len(known) and known[at][0] == rank:
        return known[at][1]
    if at in (0, len(known)):
        nearest, value = known[min(at, len(known) - 1)]
        return value * math.sqrt(nearest / rank)
    (low, one), (high, other) = known[at - 1], known[at]
    if one <= 0 or other <= 0:
        return 0.0
    share = math.log(rank / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(one) + share * math.log(other))


def turned_spread(spread: float, null: float, turned_null: float, rank: int, shape: tuple[int, int]) -> float:
    """Return the standard deviation for Vᵀ in place of V, which is `shape` = (rows, columns) and has `spread`.

    With d_out the longer side, ρ is what it is for the shorter one times the share of ‖ΔW‖ that lies inside V's range,
    and the two are independent. The square of that share is a Beta variable of a Gaussian update: its relative variance
    is 2/rank times the difference of 1/shorter and 1/longer, to first order, whatever V's rank; a root quarters it.
    The rank is what A's Gram matrix leaves of it, tr(G)²/tr(G²), which is less where d_in is not much larger.
    """
    if null <= 0:
        return 0.0
    rows, columns = shape
    before, after = (rank * d_in / (d_in + rank + 1) for d_in in (columns, rows))
    relative = (spread / null) ** 2 * before / after
    turned = relative + (1 / rows - 1 / columns) / (2 * after)
    return turned_null * math.sqrt(max(turned, _DRAWN * relative))


def find_factors(
    V: Tensor, norm: float, sketch: Sketch, *, max_rank: int = MAX_RANK, tolerance: float = TOLERANCE
) -> Factored | None:
    """Return float32 factors of the smallest rank <= `max_rank` with ‖V - U·W‖ <= `tolerance`·‖V‖, or None.

    V is (rows, columns) in float32 or float64, `norm` its Frobenius norm, not 0; `sketch` is `sketch_of(V, norm)`.
    Source: randomised range finder, Halko, Martinsson and Tropp (arXiv:0909.4061), algorithm 4.1, with a fixed seed.
    Differs: the residual is not estimated but taken entry by entry: ‖V‖² - ‖V·Q‖² cancels long before 1e-5 in float32.
    """
    Q, Y = sketch.Q, sketch.Y
    if float(torch.linalg.vector_norm(Y)) < _CAPTURED * norm:
        return None
    missed = _residual(V, Y, Q)
    wide = wide_dtype(V.device)
    left, values, right = torch.linalg.svd(Y.to(wide), full_matrices=False)
    rank = _smallest_rank(values, missed, tolerance * norm)
    if rank is None or rank > max_rank:
        return None
    root = values[:rank].sqrt()
    return Factored(
        (left[:, :rank] * root).float().contiguous(),
        ((root[:, None] * right[:rank]) @ Q.mT.to(wide)).float().contiguous(),
    )


def _residual(V: Tensor, Y: Tensor, Q: Tensor) -> float:
    """‖V - Y·Qᵀ‖, entry by entry."""
    total = torch.zeros((), dtype=wide_dtype(V.device), device=V.device)
    for rows in row_blocks(V):
        total += torch.linalg.vector_norm(V[rows] - Y[rows] @ Q.mT).to(total.dtype).square()
    return float(total.sqrt())


def _smallest_rank(values: Tensor, missed: float, allowed: float) -> int | None:
    """The least k with √(missed² + Σ_{i>=k} σᵢ²) <= allowed: what is cut and what was missed are orthogonal."""
    tail = values.double().cpu().square().flip(0).cumsum(0).flip(0)
    error = (torch.cat([tail, tail.new_zeros(1)]) + missed**2).sqrt()
    fits = (error <= allowed).nonzero()
    return int(fits[0]) if len(fits) else None
