"""Modules in batches of one shape: what is computed together, and how many of them at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..adapters import LoraFactors
from ..ops import LowRank, accumulation_dtype
from ..subspace import Subspace

# What one batch of modules may take: alignment matrices as stored, and widened factors.
_BATCH_BYTES = 256 << 20


class Batch(NamedTuple):
    """Modules computed together: `names` of one shape, rank, orientation, kind of V and device."""

    names: tuple[str, ...]
    device: torch.device
    transposed: bool
    comparable: bool


def batches(
    factors: Mapping[str, LoraFactors],
    subspace: Subspace,
    device: torch.device | str | None = None,
    batch_bytes: int | None = None,
) -> list[Batch]:
    """Return the modules in batches of one shape; none takes more than 256 MiB, or `batch_bytes`, but a single module.

    `device` None computes where each module's factors live. The same factors give the same batches each time, so what
    the subspace keeps on a device for one of them serves every later call.
    """
    groups: dict[tuple[torch.device, bool, tuple[object, ...]], list[str]] = {}
    for name, module in factors.items():
        where = module.A.device if device is None else torch.device(device)
        header = subspace.modules.get(name)
        stored = (header.kind, header.rank, header.dtype) if header else None
        groups.setdefault((where, module.transposed, (module.shape, module.rank, stored)), []).append(name)
    return [
        Batch(part, where, transposed, comparable=part[0] in subspace.modules)
        for (where, transposed, _), names in groups.items()
        for part in split(names, _factor_bytes(factors[names[0]]) + _matrix_bytes(subspace, names[0]), batch_bytes)
    ]


def split(names: Sequence[str], bytes_each: int, batch_bytes: int | None = None) -> list[tuple[str, ...]]:
    """Return `names` in runs of at most `batch_bytes`, 256 MiB if None, each of at least one."""
    count = max(1, (batch_bytes or _BATCH_BYTES) // max(1, bytes_each))
    return [tuple(names[start : start + count]) for start in range(0, len(names), count)]


def _factor_bytes(module: LoraFactors) -> int:
    return 4 * module.rank * (module.d_out + module.d_in)


def _matrix_bytes(subspace: Subspace, name: str) -> int:
    if name not in subspace.modules:
        return 0
    return subspace.modules[name].bytes(name)


def stacked(updates: Sequence[LowRank], device: torch.device) -> LowRank:
    """Return updates of one shape as one batch, (n, r, d_in) and (n, d_out, r), in float32 or better, detached."""
    dtype = accumulation_dtype(*(t for update in updates for t in update))
    A = torch.stack([update.A.detach().to(device, dtype) for update in updates])
    B = torch.stack([update.B.detach().to(device, dtype) for update in updates])
    return LowRank(A, B)
