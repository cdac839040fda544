"""Factors and a subspace in, readings out: the projected cosine of every LoRA module, with one host synchronisation.

What the safety adapter itself reads (`own_cosines`) is a measure that gates may compare with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors
from ..errors import SubspaceError
from ..ops import (
    AlignmentMatrix,
    Known,
    all_finite,
    cosine_interval,
    cosines,
    full_precision,
    squared_norm,
    wide_dtype,
)
from ..subspace import Request, Subspace
from .batches import Batch, batches, stacked
from .fit import check_safety_adapter
from .gates import Gate, Knobs, as_gate, undecided
from .reading import Reading, Readings


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
    readings = {name: _reading(factors[name], subspace, row) for name, row in zip(names, values, strict=True)}
    _require_finite_matrices([r for r in readings.values() if not r.finite and math.isfinite(r.update_norm)], subspace)
    return Readings(readings[name] for name in factors)


def _require_finite_matrices(suspects: Sequence[Reading], subspace: Subspace) -> None:
    """Raise SubspaceError where V is why a finite update has no cosine; only for these is the file looked through."""
    for reading in suspects:
        stored = subspace.tensors(list(subspace.modules[reading.name].tensors(reading.name)))
        if not all_finite(*(tensor for tensor in stored if tensor.is_floating_point())):
            raise SubspaceError(
                f"subspace {subspace.source!r}: the alignment matrix of module {reading.name!r} holds NaN or "
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


def own_cosines(
    safety: Adapter,
    factors: Mapping[str, LoraFactors],
    subspace: Subspace,
    *,
    device: torch.device | str | None = None,
    batch_bytes: int | None = None,
) -> dict[str, float]:
    """Return the safety adapter's own cosine in each module of `factors`, in [0, 1]; NaN where it has not moved.

    Exact, from the file beside a compressed subspace. One measure: it never changes, so do it once. `batch_bytes` is as
    `measure` has it. Raises AdapterError for a safety adapter that does not fit `factors`, and SubspaceError as
    `measure`.
    """
    check_safety_adapter(safety, factors)
    modules = {name: replace(safety.factors[name], transposed=live.transposed) for name, live in factors.items()}
    readings = measure(modules, subspace, device=device, batch_bytes=batch_bytes)
    return {name: math.nan if r.update_norm == 0 else r.cosine for name, r in readings.items()}


def cosines_needed(
    gates: Iterable[Gate],
    safety: Sequence[Adapter],
    factors: Mapping[str, LoraFactors],
    subspace: Subspace,
    *,
    device: torch.device | str | None = None,
    batch_bytes: int | None = None,
) -> dict[str, float] | None:
    """Return `own_cosines` of the first safety adapter where one of `gates` needs them; None where none does.

    None, too, where there is no safety adapter.
    """
    if not safety or not any("safety_cosines" in gate.criterion.needs for gate in gates):
        return None
    return own_cosines(safety[0], factors, subspace, device=device, batch_bytes=batch_bytes)
