"""Factors and a subspace in, readings out: the projected cosine of every LoRA module, with one host synchronisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from ..adapters import LoraFactors
from ..errors import SubspaceError
from ..ops import (
    AlignmentMatrix,
    Known,
    LowRank,
    accumulation_dtype,
    all_finite,
    cosine_interval,
    cosines,
    full_precision,
    squared_norm,
    wide_dtype,
)
from ..subspace import Request, Subspace
from .certify import undecided
from .gates import Gate, Knobs, as_gate
from .reading import Reading as Reading
from .reading import Readings as Readings

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


@full_precision()
def measure(
    factors: Mapping[str, LoraFactors],
    subspace: Subspace,
    *,
    device: torch.device | str | None = None,
    gate: str | Gate | None = None,
    reference: Mapping[str, float] | None = None,
    batch_bytes: int | None = None,
    **knobs: Unpack[Knobs],
) -> Readings:
    """Return the reading of every module, in the order of `factors`; nothing is written.

    Modules of one shape are batched, and the host waits for the device once. `device` None computes where the factors
    live.

    A compressed subspace gives intervals. With `gate` and its knobs only the modules of which an interval leaves the
    gate's decision open are read again, from the exact file beside it (the host waits twice then), so the decisions are
    those of the exact measure. Without `gate` every module is read from there. `reference`: the safety adapter's own
    cosines (`own_cosines`), which gate `reference` compares with; the readings hold them from then on.

    Raises SubspaceError where the subspace does not fit the modules, with names and both shapes, where its numbers are
    not finite, and where the exact file is needed and absent; ConfigError for knobs that the gate cannot use.
    """
    subspace.check(factors)
    if gate is None:
        return _with_reference(_readings(factors, subspace.exact(), device, batch_bytes), reference)
    rule = as_gate(gate, knobs)
    first = _with_reference(_readings(factors, subspace, device, batch_bytes), reference)
    again = undecided(first, rule)
    if not again:
        return first
    second = _readings({name: factors[name] for name in again}, subspace.exact(), device, batch_bytes)
    second = _with_reference(second, reference)
    return Readings(replace(second[name], reread=True) if name in second else first[name] for name in first)


def _with_reference(readings: Readings, reference: Mapping[str, float] | None) -> Readings:
    if reference is None:
        return readings
    return Readings(replace(reading, reference=reference.get(name)) for name, reading in readings.items())


def _readings(
    factors: Mapping[str, LoraFactors], subspace: Subspace, device: torch.device | str | None, batch_bytes: int | None
) -> Readings:
    """The readings as this file gives them."""
    todo = batches(factors, subspace, device, batch_bytes)
    matrices = subspace.stacks(Request(b.names, b.device, b.transposed) for b in todo if b.comparable)
    if not todo:
        return Readings(())
    # Results of several devices meet on the first, so that the host waits once. They have their place beforehand: a
    # small tensor kept after each batch would split the memory that the batch before gave back, and it would not fit
    # the next one any more.
    wide = wide_dtype(todo[0].device)
    rows = torch.empty(sum(len(b.names) for b in todo), 5, dtype=wide, device=todo[0].device)
    for batch, place in zip(todo, rows.split([len(b.names) for b in todo]), strict=True):
        place.copy_(_measure_batch(batch, factors, subspace, next(matrices) if batch.comparable else None))
    values = rows.tolist()
    names = [name for batch in todo for name in batch.names]
    found = {name: _reading(factors[name], subspace, row) for name, row in zip(names, values, strict=True)}
    _require_finite_matrices([r for r in found.values() if not r.finite and math.isfinite(r.update_norm)], subspace)
    return Readings(found[name] for name in factors)


def _require_finite_matrices(suspects: Sequence[Reading], subspace: Subspace) -> None:
    """Raise SubspaceError where V is why a finite update has no cosine; only for these is the file looked through."""
    for reading in suspects:
        stored = subspace.tensors(list(subspace.modules[reading.name].tensors(reading.name)))
        if not all_finite(*(tensor for tensor in stored if tensor.is_floating_point())):
            raise SubspaceError(
                f"subspace {str(subspace.path)!r}: the alignment matrix of module {reading.name!r} holds NaN or "
                "infinite numbers. `safemerge describe --verify` tells whether the file was changed since: copy it "
                "anew then, else build it again from whole checkpoints."
            )


def _measure_batch(
    batch: Batch, factors: Mapping[str, LoraFactors], subspace: Subspace, V: AlignmentMatrix | None
) -> Tensor:
    """(n, 5): ‖B·A‖ of each module, its cosine, the ends of its interval, and ⟨V, B·A⟩/‖B·A‖, NaN for a compressed V.

    Without V, of modules that have none.
    """
    update = stacked([factors[name].update for name in batch.names], batch.device)
    norm = squared_norm(update).sqrt()
    headers = [subspace.modules[name] for name in batch.names if V is not None]
    along = torch.full_like(norm, torch.nan)
    if V is None:
        cosine = torch.where(torch.isfinite(norm), torch.ones_like(norm), torch.full_like(norm, torch.nan))
    elif headers[0].exact:
        cosine, along = (values.to(norm.dtype) for values in cosines(update, V))
    else:
        known = torch.tensor([[h.error, h.cross, h.norm] for h in headers], dtype=norm.dtype, device=norm.device)
        interval = cosine_interval(update, V, Known(*known.T)).to(norm.dtype)
        return torch.cat([norm[:, None], interval, along[:, None]], dim=-1)
    return torch.stack([norm, cosine, cosine, cosine, along], dim=-1)


def _reading(module: LoraFactors, subspace: Subspace, row: Sequence[float]) -> Reading:
    norm, cosine, *ends, along = row
    header = subspace.modules.get(module.name)
    null = subspace.null_cosine(module.name, module.transposed) if header else 1.0
    interval = (ends[0], ends[1]) if header and not header.exact else None
    size = abs(module.scaling) * norm
    spread = subspace.null_std(module.name, module.rank, module.transposed) if header else None
    # A negative scaling turns the update round.
    signed = math.copysign(along / header.norm, along * module.scaling) if header and math.isfinite(along) else None
    return Reading(
        module.name,
        cosine,
        null,
        size,
        module.rank,
        module.shape,
        header is not None,
        interval,
        null_std=spread,
        signed_cosine=signed,
    )
