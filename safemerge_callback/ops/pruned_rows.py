"""An update without the largest scores of each of its rows, formed a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .lowrank import LowRank, accumulation_dtype, wide_dtype
from .shapes import Float, Tensor

# Entries of the update that are formed at once, of all modules of a batch together: 4 MB in float32.
_BLOCK_ENTRIES = 1 << 20


class PrunedRows:
    """(1 - M) ∘ B·A, (*n, d_out, d_in), as something that matrices are multiplied with: at no time is it whole.

    M marks the ⌊share·d_in⌋ entries of each row whose score |B·A|·norms_j is largest, one at least, none at share 0.
    Only each row's threshold is kept, (*n, d_out): entries with scores above it are 0. Of equal scores at the threshold
    none is taken. `norms` (*n, d_in) are not below 0. float32 or float64, as the factors are.
    """

    def __init__(self, update: LowRank, norms: Float[Tensor, "*n d_in"], share: float) -> None:
        self.dtype = accumulation_dtype(*update)
        self.device = update.A.device
        self._A, self._B = update.A.to(self.dtype), update.B.to(self.dtype)
        self._norms = norms.to(self.dtype)[..., None, :]
        *batch, self.d_out, _ = update.B.shape
        self.shape = torch.Size([*batch, self.d_out, update.A.shape[-1]])
        width = self.shape[-1]
        kept = width - (0 if share == 0 else max(1, int(share * width)))
        limits = [self._scores(block).kthvalue(max(kept, 1), dim=-1, keepdim=True).values for block in self._blocks()]
        # Where nothing is kept the least score is no limit.
        self._limits = torch.cat(limits, dim=-2) if kept else torch.full_like(self._B[..., :1], -1.0)

    def _blocks(self) -> Iterator[Tensor]:
        """B·A, a block of rows at a time."""
        for rows in self._slices():
            yield self._B[..., rows, :] @ self._A

    def _slices(self) -> Iterator[slice]:
        rows = max(1, _BLOCK_ENTRIES * self.d_out // max(1, self.shape.numel()))
        return (slice(start, start + rows) for start in range(0, self.d_out, rows))

    def _scores(self, block: Tensor) -> Tensor:
        return block.abs() * self._norms

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each block, and its (*n, rows, d_in) after the pruning."""
        for rows, block in zip(self._slices(), self._blocks(), strict=True):
            yield rows, block.masked_fill(self._scores(block) > self._limits[..., rows, :], 0.0)

    def norm(self) -> Float[Tensor, "*n"]:
        """Return its Frobenius norm, (*n), in float64."""
        squares = [block.to(wide_dtype(self.device)).square().sum((-2, -1)) for _, block in self.blocks()]
        return torch.stack(squares).sum(0).sqrt()

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return self·other, (*n, d_out, k)."""
        return torch.cat([block @ other for _, block in self.blocks()], dim=-2)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """Return other·self, (*n, k, d_in)."""
        parts = (other[..., :, rows] @ block for rows, block in self.blocks())
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    @property
    def mT(self) -> _Transposed:  # noqa: N802
        """The transposed, as something that matrices are multiplied with."""
        return _Transposed(self)


class _Transposed:
    def __init__(self, of: PrunedRows) -> None:
        self._of = of

    def __matmul__(self, other: Tensor) -> Tensor:
        return (other.mT @ self._of).mT
