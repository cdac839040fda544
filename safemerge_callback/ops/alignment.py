"""An alignment matrix V in the forms it is stored in: dense, as two factors, or in eight bits a value."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .shapes import Tensor


class Factored(NamedTuple):
    """An alignment matrix V = U·W of rank k: `U` is (*n, d_out, k), `W` is (*n, k, d_in)."""

    U: Tensor
    W: Tensor


class Int8(NamedTuple):
    """An alignment matrix V = Q∘scale: `Q` is int8 (*n, d_out, d_in), `scale` (*n, d_out, 1) or (*n, 1, d_in)."""

    Q: Tensor
    scale: Tensor


AlignmentMatrix = Tensor | Factored | Int8


def moved(V: AlignmentMatrix, device: torch.device) -> AlignmentMatrix:
    """Return V on `device`; its tensors themselves where they are there already."""
    if isinstance(V, Factored):
        return Factored(V.U.to(device), V.W.to(device))
    if isinstance(V, Int8):
        return Int8(V.Q.to(device), V.scale.to(device))
    return V.to(device)


def turned(V: AlignmentMatrix) -> AlignmentMatrix:
    """Return Vᵀ, as views."""
    if isinstance(V, Factored):
        return Factored(V.W.mT, V.U.mT)
    if isinstance(V, Int8):
        return Int8(V.Q.mT, V.scale.mT)
    return V.mT


def rows_of(V: Tensor | Int8, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return some rows of V in `dtype`."""
    if isinstance(V, Tensor):
        return V[..., rows, :].to(dtype)
    scale = V.scale[..., rows, :] if V.scale.shape[-1] == 1 else V.scale
    return V.Q[..., rows, :].to(dtype) * scale.to(dtype)
