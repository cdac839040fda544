"""A spectral norm bounded from above, with a proof that survives floating point."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .shapes import Tensor

_UNIT_ROUNDOFF = 2.0**-53


def spectral_bound(blocks: Iterable[Tensor]) -> float:
    """Return a bound on ‖E‖₂, at most a few per cent above it, of the matrix whose blocks of rows are given in float64.

    With G = EᵀE, n × n: if the Cholesky factorisation of μI − G runs to its end, then μI − G ≥ −δI and ‖E‖₂² ≤ μ + δ.
    δ covers what rounding can do: 2(n + 2)u·nμ for the factorisation (Rump, BIT 46 (2006)),
    2m·u·‖E‖² for G summed over m rows, both doubled. μ is tried upwards from an estimate by subspace iteration; ‖E‖²
    itself is the last resort. Needs two n × n matrices in float64: give the blocks of Eᵀ where it has fewer rows.
    """
    gram, rows = _gram(blocks)
    if gram is None:
        return 0.0
    n, total = gram.shape[0], float(gram.trace())
    if total == 0:
        return 0.0
    of_gram = 4 * rows * _UNIT_ROUNDOFF * total
    mu, shift = 1.005 * _estimate(gram), 0.0
    difference = gram.neg_()
    while mu < total:
        difference.diagonal().add_(mu - shift)
        shift = mu
        if int(torch.linalg.cholesky_ex(difference).info) == 0:
            break
        mu *= 1.02
    bounded = min(mu, total)
    # The diagonal took several rounded sums, of which there are fewer than 64 per doubling of mu.
    return (bounded * (1 + 4 * (n + 2) * n * _UNIT_ROUNDOFF + 512 * _UNIT_ROUNDOFF) + of_gram) ** 0.5


def _gram(blocks: Iterable[Tensor]) -> tuple[Tensor | None, int]:
    gram, rows = None, 0
    for block in blocks:
        rows += block.shape[0]
        gram = block.mT @ block if gram is None else gram.addmm_(block.mT, block)
    return gram, rows


def _estimate(gram: Tensor, vectors: int = 8, rounds: int = 12) -> float:
    """A lower estimate of the largest eigenvalue, by subspace iteration from a fixed seed."""
    n = gram.shape[0]
    start = torch.randn(n, min(vectors, n), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = start.to(gram.device)
    for _ in range(rounds):
        basis = torch.linalg.qr(gram @ basis).Q
    return float(torch.linalg.eigvalsh(basis.mT @ (gram @ basis))[-1])
