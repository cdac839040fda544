"""Factors and a subspace in, readings out: the projected cosine of every LoRA module, with one host synchronisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import LoraFactors
from ..ops import AlignmentMatrix, LowRank, accumulation_dtype, full_precision, projected_cosine, squared_norm
from ..subspace import Request, Subspace
from .tables import render

# What one batch of modules may take: alignment matrices as stored, and widened factors.
_BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Reading:
    """One module measured.

    `cosine`: in [0, 1] (Safe LoRA, arXiv:2405.16833; SafeMERGE, arXiv:2503.17239), 1.0 for an update that is zero, NaN
    for one that is not finite. `null_cosine`: that of an update unrelated to V. `update_norm`: s·‖B·A‖ (Frobenius).
    `shape`: (d_out, d_in) of the map. `comparable` is False where aligned and unaligned are equal, so that V = 0 and
    `cosine` is 1.0 by convention.
    """

    name: str
    cosine: float
    null_cosine: float
    update_norm: float
    rank: int
    shape: tuple[int, int]
    comparable: bool = True

    @property
    def finite(self) -> bool:
        """Whether the update holds finite numbers only."""
        return math.isfinite(self.cosine) and math.isfinite(self.update_norm)

    @property
    def drift(self) -> float:
        """1 - cosine, for display."""
        return 1.0 - self.cosine


class Readings(Mapping[str, Reading]):
    """Module name -> `Reading`, immutable, in the order measured; prints as a table."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = {reading.name: reading for reading in readings}

    def __getitem__(self, name: str) -> Reading:
        return self._readings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readings)

    def __len__(self) -> int:
        return len(self._readings)

    def below(self, threshold: float) -> list[str]:
        """Return the modules whose cosine lies strictly below `threshold`, compared unrounded; never a NaN."""
        return [name for name, reading in self.items() if reading.cosine < threshold]

    def __str__(self) -> str:
        columns = ("module", "shape", "rank", "cosine", "null", "‖update‖")
        return render(f"{len(self)} modules measured", columns, map(_row, self.values()), right=columns[1:])

    def __repr__(self) -> str:
        return f"Readings({len(self)} modules)"


def _row(reading: Reading) -> tuple[str, ...]:
    shape = f"{reading.shape[0]} x {reading.shape[1]}"
    numbers = (f"{reading.cosine:.4f}", f"{reading.null_cosine:.4f}", f"{reading.update_norm:.4g}")
    return (reading.name, shape, str(reading.rank), *numbers)


class Batch(NamedTuple):
    """Modules computed together: `names` of one shape, rank, orientation, kind of V and device."""

    names: tuple[str, ...]
    device: torch.device
    transposed: bool
    comparable: bool


def batches(
    factors: Mapping[str, LoraFactors], subspace: Subspace, device: torch.device | str | None = None
) -> list[Batch]:
    """Return the modules in batches of one shape, none of which takes more than 256 MiB unless it is a single module.

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
        for part in split(names, _factor_bytes(factors[names[0]]) + _matrix_bytes(subspace, names[0]))
    ]


def split(names: Sequence[str], bytes_each: int) -> list[tuple[str, ...]]:
    """Return `names` in runs of at most 256 MiB, each of at least one."""
    count = max(1, _BATCH_BYTES // max(1, bytes_each))
    return [tuple(names[start : start + count]) for start in range(0, len(names), count)]


def _factor_bytes(module: LoraFactors) -> int:
    return 4 * module.rank * (module.d_out + module.d_in)


def _matrix_bytes(subspace: Subspace, name: str) -> int:
    if name not in subspace.modules:
        return 0
    header = subspace.modules[name]
    itemsize = getattr(torch, header.dtype).itemsize
    return itemsize * sum(rows * columns for rows, columns in header.tensors(name).values())


def stacked(updates: Sequence[LowRank], device: torch.device) -> LowRank:
    """Return updates of one shape as one batch, (n, r, d_in) and (n, d_out, r), in float32 or better, detached."""
    dtype = accumulation_dtype(*(t for update in updates for t in update))
    A = torch.stack([update.A.detach().to(device, dtype) for update in updates])
    B = torch.stack([update.B.detach().to(device, dtype) for update in updates])
    return LowRank(A, B)


@torch.no_grad()
@full_precision()
def measure(
    factors: Mapping[str, LoraFactors], subspace: Subspace, *, device: torch.device | str | None = None
) -> Readings:
    """Return the reading of every module, in the order of `factors`; nothing is written.

    Modules of one shape are batched, and the host waits for the device once. `device` None computes where the factors
    live. Raises SubspaceError where the subspace does not fit the modules: names and both shapes are in the message.
    """
    subspace.check(factors)
    todo = batches(factors, subspace, device)
    matrices = subspace.stacks(Request(b.names, b.device, b.transposed) for b in todo if b.comparable)
    measured = [_measure_batch(batch, factors, next(matrices) if batch.comparable else None) for batch in todo]
    if not measured:
        return Readings(())
    # Results of several devices meet on the first, so that the host waits once.
    values = torch.cat([part.to(measured[0].device) for part in measured]).tolist()
    names = [(name, batch.comparable) for batch in todo for name in batch.names]
    found = {
        name: _reading(factors[name], subspace if comparable else None, cosine, norm)
        for (name, comparable), (cosine, norm) in zip(names, values, strict=True)
    }
    return Readings(found[name] for name in factors)


def _measure_batch(batch: Batch, factors: Mapping[str, LoraFactors], V: AlignmentMatrix | None) -> Tensor:
    """(n, 2): the cosine and ‖B·A‖ of each module; without V, of modules that have none."""
    update = stacked([factors[name].update for name in batch.names], batch.device)
    norm = squared_norm(update).sqrt()
    if V is not None:
        cosine = projected_cosine(update, V).to(norm.dtype)
    else:
        cosine = torch.where(torch.isfinite(norm), torch.ones_like(norm), torch.full_like(norm, torch.nan))
    return torch.stack([cosine, norm], dim=-1)


def _reading(module: LoraFactors, subspace: Subspace | None, cosine: float, norm: float) -> Reading:
    null = subspace.null_cosine(module.name, module.transposed) if subspace else 1.0
    size = abs(module.scaling) * norm
    return Reading(module.name, cosine, null, size, module.rank, module.shape, comparable=subspace is not None)
