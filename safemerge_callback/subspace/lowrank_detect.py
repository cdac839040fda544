"""Find out whether V truly has low rank (it came from a merged adapter), and factor it if so."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Factored, wide_dtype
from .blocks import row_blocks
from .spectrum import Sketch

MAX_RANK = 64
TOLERANCE = 1e-5
# Below this share of ‖V‖ captured, the residual is far above TOLERANCE whatever the rounding.
_CAPTURED = 0.999


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
