"""One decision for all processes: rank 0's. With one process each of these is the identity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def many() -> bool:
    """Whether more than one process trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first(value: Value) -> Value:
    """Return rank 0's `value` on every rank. Collective: every rank must call it."""
    if not many():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor in place with rank 0's. Collective: same tensors, in the same order, on every rank.

    DDP never compares parameters again after it has started, so what one rank edits a little differently would stay
    so, and grow.
    """
    if not many():
        return
    for tensor in tensors:
        whole = tensor.contiguous()
        dist.broadcast(whole, src=0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
