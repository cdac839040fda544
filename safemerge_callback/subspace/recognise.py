"""A few weights of the aligned checkpoint, kept to recognise the base model that a run trains on."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import row_blocks

COUNT = 16
# bfloat16 rounds by at most 2⁻⁹ of the value; twice that also covers a load through float16.
_RELATIVE = 2.0**-8
_ABSOLUTE = 1e-7


def choose_positions(weight: Tensor, V: Tensor | None) -> Tensor:
    """Return COUNT positions in the flattened weight, int64.

    Spread evenly; where V (of the same shape) is at hand, half of them where |V| is largest, since many weights of two
    closely related checkpoints are equal and would not tell them apart.
    """
    even = COUNT // 2 if V is not None else COUNT
    positions = (torch.arange(even) * (weight.numel() - 1)) // max(1, even - 1)
    if V is None:
        return positions
    largest = _largest(V, COUNT - even)
    return torch.cat([positions, largest, positions])[:COUNT]


def _largest(V: Tensor, count: int) -> Tensor:
    values, places = [], []
    for rows in row_blocks(V):
        flat = V[rows].reshape(-1).abs()
        top = torch.topk(flat, min(count, flat.numel()))
        values.append(top.values.cpu())
        places.append(top.indices.cpu() + rows.start * V.shape[1])
    best = torch.topk(torch.cat(values), min(count, V.numel())).indices
    return torch.cat(places)[best]


def values_at(weight: Tensor, positions: Tensor) -> Tensor:
    """Return the weight at these flattened positions, float32 on the CPU."""
    return weight.detach().reshape(-1)[positions.to(weight.device)].float().cpu()


def matches(weight: Tensor, positions: Tensor, expected: Tensor) -> bool:
    """Return whether a live weight is the recorded one, up to a load in float16 or bfloat16."""
    values = values_at(weight, positions)
    return bool(((values - expected).abs() <= _RELATIVE * expected.abs() + _ABSOLUTE).all())
