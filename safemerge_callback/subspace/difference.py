"""V = W_aligned - W_unaligned of one module: exact, checked, and in the narrowest dtype that holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SubspaceError
from ..ops import wide_dtype
from .blocks import row_blocks


def difference(aligned: Tensor, unaligned: Tensor, device: torch.device) -> Tensor:
    """Return aligned - unaligned on `device`, in float32, or in float64 where either is float64.

    V has the shape of `aligned`; where `unaligned` has fewer rows, V is zero in those that it lacks.
    """
    wide = torch.float64 in (aligned.dtype, unaligned.dtype)
    V = torch.empty(aligned.shape, dtype=torch.float64 if wide else torch.float32, device=device)
    common = min(len(aligned), len(unaligned))
    for rows in row_blocks(V[:common]):
        # Moved first and widened there: half the bytes to move, for narrow weights.
        weight, other = (w[:common][rows].to(device).to(V.dtype) for w in (aligned, unaligned))
        torch.sub(weight, other, out=V[:common][rows])
    V[common:] = 0
    return V


def norm_of(V: Tensor) -> float:
    """Return ‖V‖ (Frobenius), summed in float64; NaN or inf if V is not finite."""
    wide = wide_dtype(V.device)
    norms = [torch.linalg.vector_norm(V[rows], dtype=wide) for rows in row_blocks(V)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def require_finite(name: str, weight: Tensor, source: str) -> None:
    """Raise SubspaceError if `weight` has a NaN or an infinity, naming module and checkpoint."""
    bad = sum(int((~torch.isfinite(weight[rows])).sum()) for rows in row_blocks(weight))
    if bad:
        raise SubspaceError(
            f"checkpoint {source!r}: module {name!r} has {bad} values that are not finite. Use an intact checkpoint."
        )


def storage_dtype(V: Tensor, *sources: torch.dtype) -> torch.dtype:
    """Return the narrowest of `sources` that holds every entry of V bit for bit, else V's own dtype."""
    for dtype in sorted(set(sources), key=lambda d: d.itemsize):
        if dtype.itemsize < V.dtype.itemsize and all(_holds(V[rows], dtype) for rows in row_blocks(V)):
            return dtype
    return V.dtype


def _holds(block: Tensor, dtype: torch.dtype) -> bool:
    return bool((block.to(dtype).to(block.dtype) == block).all())
