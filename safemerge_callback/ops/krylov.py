"""The leading singular triplets of a large dense matrix, without decomposing all of it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from .shapes import Float, Tensor

# Columns beyond the rank, and powers of the matrix in the basis: with them the triplets of a masked low-rank update are
# those of the full decomposition to float32's own precision.
_EXTRA, _ROUNDS = 8, 8


@runtime_checkable
class Products(Protocol):
    """A matrix (*n, d_out, d_in) that need not be there: what it is multiplied with gives tensors, on both sides."""

    @property
    def shape(self) -> torch.Size:
        """(*n, d_out, d_in)."""

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""

    @property
    def device(self) -> torch.device:
        """Where the products are."""

    @property
    def mT(self) -> Any:  # noqa: N802
        """The transposed, which a tensor may follow as a factor."""

    def __matmul__(self, other: Tensor, /) -> Tensor:
        """Return self·other."""

    def __rmatmul__(self, other: Tensor, /) -> Tensor:
        """Return other·self."""


def leading_triplets(
    target: Float[Tensor, "*n d_out d_in"] | Products, rank: int, rounds: int = _ROUNDS
) -> tuple[Float[Tensor, "*n d_out k"], Float[Tensor, "*n k"], Float[Tensor, "*n k d_in"]]:
    """Return the first k = min(rank, d_out, d_in) singular triplets, in the dtype of `target`, float32 or float64.

    `target` is only multiplied with: 2 · `rounds` + 1 times at most.

    Source: randomised block Krylov iteration (Musco and Musco 2015, arXiv:1504.05477, Algorithm 2): from X random, the
    Rayleigh-Ritz values in the span of TX, (TTᵀ)TX, ... Differs: each block is orthonormalised before the next, or high
    powers would round to the first direction; X has a fixed seed, so that every process and every run finds the same.

    The values are lower bounds. Where the spectrum falls after `rank` they are exact to rounding; where it is flat, the
    vectors are any of many that are about as good, and the error that the truncation leaves is above the least one by
    less than 0.1 % of the norm. `rounds`: powers of the matrix in the basis; time and precision grow
    with them.
    """
    d_out, d_in = target.shape[-2:]
    source = torch.Generator().manual_seed(0)
    shorter = min(d_out, d_in)
    width = min(rank + _EXTRA, shorter)
    start = torch.randn(d_in, width, generator=source, dtype=target.dtype).to(target.device)
    block = torch.linalg.qr(target @ start).Q
    blocks = [block]
    # A small matrix is spanned whole, by a last block of fewer columns.
    while len(blocks) < rounds and (left_over := shorter - width * len(blocks)) > 0:
        block = torch.linalg.qr(target @ (target.mT @ block)).Q[..., :left_over]
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=-1)).Q
    left, values, right = torch.linalg.svd(basis.mT @ target, full_matrices=False)
    k = min(rank, d_out, d_in)
    return (basis @ left)[..., :k], values[..., :k], right[..., :k, :]
