"""V in eight bits a value, or cut to a rank, and what is proven of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import Factored, Int8, rows_of, spectral_bound, turned

# Rows turned to float64 at a time, by elements: 32 MiB.
_BLOCK = 1 << 22
_UNIT_ROUNDOFF = 2.0**-53


class Bounds(NamedTuple):
    """What is proven of E = V - V_stored: ‖E‖₂ ≤ `error`, ‖V_stored·Eᵀ‖₂ and ‖V_storedᵀ·E‖₂ ≤ `cross`."""

    error: float
    cross: float


def quantised(V: Tensor) -> Int8:
    """Return V (rows, columns) in eight bits a value; a row of zeros has scale 0."""
    scale = (V.abs().amax(1, keepdim=True).double() / 127).float()
    Q = torch.empty(V.shape, dtype=torch.int8, device=V.device)
    for rows in _slices(V):
        by = torch.where(scale[rows] > 0, scale[rows], torch.ones_like(scale[rows])).double()
        Q[rows] = (V[rows].double() / by).round().clamp(-127, 127).to(torch.int8)
    return Int8(Q, scale)


def truncated(V: Tensor, rank: int) -> Factored:
    """Return U·W ≈ V of `rank`, float32: U near V's leading left singular vectors, W = Uᵀ·V.

    Subspace iteration with ten more columns and a fixed seed (Halko, Martinsson, Tropp 2011). How near it comes shows
    in what `proven` finds, which does not rely on it.
    """
    dtype = torch.float64 if V.dtype == torch.float64 else torch.float32
    columns = min(rank + 10, *V.shape)
    source = torch.Generator().manual_seed(0)
    start = torch.randn(V.shape[1], columns, generator=source, dtype=torch.float32).to(V.device, dtype)
    wide = V.to(dtype)
    basis = torch.linalg.qr(wide @ start).Q
    for _ in range(6):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.mT @ basis).Q).Q
    turn = torch.linalg.svd((basis.mT @ wide).double(), full_matrices=False).U
    U = (basis.double() @ turn[:, :rank]).float()
    W = sum(U[rows].double().mT @ V[rows].double() for rows in _slices(V))
    assert isinstance(W, Tensor), "V has rows"
    return Factored(U, W.float())


def proven(V: Tensor, stored: Int8 | Factored) -> Bounds:
    """Return bounds on E = V - stored that hold whatever `stored` is; see `spectral_bound`.

    E is formed in float64 by blocks. For Int8 each entry of it is one rounded subtraction of exact numbers, for U·W of
    rank k a sum of k products: with unit roundoff u the computed E is within u·‖E‖, plus 2(k + 2)u·‖U‖·‖W‖ for the
    latter (Frobenius norms), of the true one. ‖V_stored·Eᵀ‖₂ ≤ ‖U‖₂·‖W·Eᵀ‖ and ‖V_storedᵀ·E‖₂ ≤ ‖W‖₂·‖Uᵀ·E‖ for
    factors, where these are small as U spans singular vectors of V; ‖V_stored‖₂·‖E‖₂ otherwise.
    """
    wide = V.shape[0] < V.shape[1]
    if wide:
        V, stored = V.mT, _turned(stored)
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(E) for E in _residual(V, stored)])))
    slack = 2 * _UNIT_ROUNDOFF * norm + _product_slack(stored)
    error = spectral_bound(_residual(V, stored)) + slack
    cross = (spectral_bound(_stored_rows(V, stored)) + slack) * error
    if isinstance(stored, Factored):
        cross = min(cross, _cross(V, stored, slack))
    return Bounds(error * (1 + 1e-12), cross * (1 + 1e-12))


def _product_slack(stored: Int8 | Factored) -> float:
    if isinstance(stored, Int8):
        return 0.0
    U, W = (float(torch.linalg.vector_norm(t.double())) for t in stored)
    return 2 * (stored.U.shape[-1] + 2) * _UNIT_ROUNDOFF * U * W


def _cross(V: Tensor, stored: Factored, slack: float) -> float:
    """The larger of ‖U‖₂·‖W·Eᵀ‖ and ‖W‖₂·‖Uᵀ·E‖, with the rounding of E and of the sums over its rows and columns."""
    U, W = stored.U.double(), stored.W.double()
    above = torch.zeros((), dtype=torch.float64, device=V.device)
    beside = torch.zeros_like(W)
    squared = torch.zeros_like(above)
    for rows, E in zip(_slices(V), _residual(V, stored), strict=True):
        above += (E @ W.mT).square().sum()
        beside += U[rows].mT @ E
        squared += E.square().sum()
    sizes = [float(torch.linalg.vector_norm(t)) for t in (U, W)]
    rounding = slack + 2 * (max(V.shape) + 2) * _UNIT_ROUNDOFF * float(squared.sqrt())
    left = spectral_bound([U]) * (float(above.sqrt()) + sizes[1] * rounding)
    right = spectral_bound([W.mT]) * (float(torch.linalg.vector_norm(beside)) + sizes[0] * rounding)
    return max(left, right)


def _turned(stored: Int8 | Factored) -> Int8 | Factored:
    other = turned(stored)
    assert not isinstance(other, Tensor), "kinds are kept"
    return other


def _slices(V: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // V.shape[1])
    return (slice(start, start + step) for start in range(0, V.shape[0], step))


def _stored_rows(V: Tensor, stored: Int8 | Factored) -> Iterator[Tensor]:
    for rows in _slices(V):
        if isinstance(stored, Int8):
            yield rows_of(stored, rows, torch.float64)
        else:
            yield stored.U[rows].double() @ stored.W.double()


def _residual(V: Tensor, stored: Int8 | Factored) -> Iterator[Tensor]:
    for rows, near in zip(_slices(V), _stored_rows(V, stored), strict=True):
        yield V[rows].double() - near
