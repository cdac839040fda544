"""What merges would do, over gates × weights × methods, before one is made; no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from ...adapters import Adapter
from ...decision import (
    Choices,
    Gate,
    MergePlan,
    Readings,
    as_gate,
    check_safety_adapter,
    cosines_needed,
    measure,
    merged_factors,
    needs_of,
)
from ...errors import ConfigError, PlanError
from ...io.knobs import unknown_knob
from ...methods import How, as_how, check_merge, get_method, method_of
from ...methods.how import AUTO, MethodKnobs
from ...methods.registry import knobs as declared
from ...ops import LowRank, full_precision
from ...signals.module_signals import data_among
from ...subspace import Subspace
from ..parts import CHUNK_BYTES, AdapterSource, adapter_of, adapters_of, chunks, copies_of_base, left_out, subspace_of
from .small_space import MergeEffect, core_effect, fits_core, in_core, merge_effect
from .table import Cell, Sweep

# Every module, and eight cosines around the released SafeMERGE's 0.35.
DEFAULT_GATES = (
    Gate("all"),
    *(Gate("threshold", threshold=cosine) for cosine in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55)),
)
Device = torch.device | str | None
# How is merged, and what it would do to each module, in numbers.
Column = tuple[How, dict[str, MergeEffect]]
# Modules of equal ranks: names, live cores, cores of the others, and scalings, (n).
Core = tuple[list[str], LowRank, list[LowRank], torch.Tensor]


def sweep_adapters(
    finetuned: AdapterSource,
    safety: AdapterSource | Sequence[AdapterSource] | None,
    subspace: str | Path | Subspace,
    *,
    gates: Sequence[str | Gate] = DEFAULT_GATES,
    weights: Sequence[Sequence[float]] = ((0.8, 0.2),),
    methods: Sequence[str] = (AUTO,),
    space: str = "delta",
    device: torch.device | str | None = None,
    **knobs: Unpack[MethodKnobs],
) -> Sweep:
    """Return what merging `safety` into `finetuned` would do for every gate, method and weights.

    A gate is a `Gate` with its knobs, or the name of one. Modules are measured once, and each is reduced once to
    factors of rank Σ r (`in_core`); every cell is then r × r arithmetic. Methods that work entry by entry, and
    `project`, are carried out instead, module by module, and take as long as so many merges. `space` and the methods'
    own knobs (density, ...) go to those that know them. The figures are those of `merge`.
    Source: none.

    Raises ConfigError for knobs that cannot be and for gates with soft weights, which differ by gate; otherwise as
    `merge_adapters`.
    """
    safety_adapters = adapters_of(safety)
    named = [method_of(method, len(safety_adapters)) for method in methods]
    merges = _merges(named, weights, space, knobs)
    swept_gates = [as_gate(gate, {}) for gate in gates]
    _check(swept_gates, merges, safety_adapters)
    task, matrices = adapter_of(finetuned), subspace_of(subspace)
    left_out(safety_adapters, task.factors, copies_of_base(task), level=3)
    readings = _readings(task, safety_adapters, matrices, swept_gates, device)
    columns = _columns(merges, readings, task, safety_adapters, matrices, device)
    return Sweep((_cell(gate, how, table, readings) for gate in swept_gates for how, table in columns), readings)


def _merges(
    methods: Sequence[str], weights: Sequence[Sequence[float]], space: str, knobs: Mapping[str, Any]
) -> list[How]:
    """How each column merges; a knob that a method does not read is left out of its own."""
    known = tuple(declared())
    if unknown := [name for name in knobs if name not in known]:
        raise unknown_knob(unknown[0], known, "a sweep")
    merges = []
    for name in dict.fromkeys(methods):
        method = get_method(name)
        settings = {knob: value for knob, value in knobs.items() if knob in method.takes}
        settings["space"] = space if space in method.spaces else method.spaces[0]
        # One column of a method to which weights mean nothing.
        merges += [
            as_how(name, {**settings, "weights": numbers}) for numbers in (weights if method.weighted else [None])
        ]
    return merges


def _check(gates: Sequence[Gate], merges: Sequence[How], safety_adapters: Sequence[Adapter]) -> None:
    if not gates or not merges:
        raise ConfigError("a sweep needs at least one gate, one method and one list of weights, got none: give one")
    for gate in gates:
        if gate.soft or not gate.merges:
            what = "soft weights differ with the gate" if gate.soft else f"gate {gate.name!r} merges nothing"
            raise ConfigError(f"gate {str(gate)!r} cannot be swept: {what}. Leave it out, and use `merge`.")
    for how in merges:
        if "average" in how.needs:
            raise ConfigError(f"method {how.method!r} goes to the average of a run's own updates: it cannot be swept.")
        if data := [who for gate in gates for who in data_among(needs_of(how, gate)).values()]:
            raise ConfigError(f"{data[0]} asks a live model about rows: it cannot be swept.")
        if how.kind.weighted:
            check_merge(how.method, how.space, how.weights, len(safety_adapters) or None)
    needs = (needs_of(how, gate) for how in merges for gate in gates)
    needing = [who["safety_adapter"] for who in needs if "safety_adapter" in who]
    if not safety_adapters and needing:
        raise PlanError(f"{needing[0]} needs a safety adapter, got none: give its folder or Hub id.")


def _readings(
    task: Adapter, safety_adapters: Sequence[Adapter], subspace: Subspace, gates: Sequence[Gate], device: Device
) -> Readings:
    for safety_adapter in safety_adapters:
        check_safety_adapter(safety_adapter, task.factors)
    cosines = cosines_needed(gates, safety_adapters, task.factors, subspace, device=device, batch_bytes=CHUNK_BYTES)
    return measure(task.factors, subspace, device=device, reference=cosines, batch_bytes=CHUNK_BYTES)


@full_precision()
def _columns(
    merges: Sequence[How],
    readings: Readings,
    task: Adapter,
    safety_adapters: Sequence[Adapter],
    subspace: Subspace,
    device: Device,
) -> list[Column]:
    """How each merge is made, and what it would do to every module with finite weights, by name."""
    names = [name for name, reading in readings.items() if reading.finite]
    small = any(fits_core(how) for how in merges)
    cores = _cores(names, task, safety_adapters) if small else []
    columns = []
    for how in merges:
        if fits_core(how):
            parts = (_by_name(run, core_effect(how, live, others, scaling)) for run, live, others, scaling in cores)
        else:
            parts = (
                _effects_by_merging(how, run, readings, task, safety_adapters, subspace, device)
                for run in _runs(how, names, task, subspace)
            )
        columns.append((how, {name: row for part in parts for name, row in part.items()}))
    return columns


def _cores(names: Sequence[str], task: Adapter, safety_adapters: Sequence[Adapter]) -> list[Core]:
    """All modules in their cores, stacked where the ranks agree: a few kilobytes each."""
    groups: dict[tuple[int, ...], list[tuple[str, list[LowRank], float]]] = {}
    for name in names:
        live = task.factors[name]
        updates = [
            LowRank(live.A, live.B),
            *(safety_adapter.factors[name].low_rank(unit=live.scaling) for safety_adapter in safety_adapters),
        ]
        groups.setdefault(tuple(u.A.shape[0] for u in updates), []).append((name, in_core(updates), live.scaling))
    cores = []
    for group in groups.values():
        task_core, *other_cores = (
            LowRank(*(torch.stack(t) for t in zip(*u, strict=True))) for u in zip(*(g[1] for g in group), strict=True)
        )
        scaling = torch.tensor([g[2] for g in group], dtype=task_core.A.dtype)
        cores.append(([g[0] for g in group], task_core, other_cores, scaling))
    return cores


def _by_name(names: Sequence[str], effect: MergeEffect) -> dict[str, MergeEffect]:
    rows = torch.stack([*effect]).T.tolist()
    return {name: MergeEffect(*row) for name, row in zip(names, rows, strict=True)}


def _runs(how: How, names: Sequence[str], task: Adapter, subspace: Subspace) -> Iterator[list[str]]:
    yield from chunks(names, task, subspace if "subspace" in how.needs else None)


def _effects_by_merging(
    how: How,
    names: Sequence[str],
    readings: Readings,
    task: Adapter,
    safety_adapters: Sequence[Adapter],
    subspace: Subspace,
    device: Device,
) -> dict[str, MergeEffect]:
    """The same of merges that are carried out, and thrown away."""
    plan = MergePlan.of(Readings(readings[name] for name in names), Choices(Gate("all"), how))
    factors = {name: task.factors[name] for name in names}
    new, edits = merged_factors(plan, factors, safety_adapters, subspace, device)
    effects = {}
    for edit in edits:
        old = factors[edit.name]
        residual, scaling = torch.tensor([edit.residual, old.scaling], dtype=torch.float64)
        row = merge_effect(LowRank(old.A, old.B), LowRank(*(t.cpu() for t in new[edit.name])), residual, scaling)
        effects[edit.name] = MergeEffect(*(float(value) for value in row))
    return effects


def _cell(gate: Gate, how: How, table: Mapping[str, MergeEffect], readings: Readings) -> Cell:
    plan = MergePlan.of(readings, Choices(gate, how))
    chosen = [table[name] for name in plan.selected]
    kept = sum(r.update_norm**2 for n, r in readings.items() if r.finite and not plan.verdicts[n].merge)
    old, new, inner, distance, target, dropped = (
        (sum(column) for column in zip(*chosen, strict=True)) if chosen else (0.0,) * 6
    )
    norms = math.sqrt((kept + old) * (kept + new))
    return Cell(
        gate.name,
        gate.knob,
        how.method,
        how.space,
        how.weights,
        len(chosen),
        len(readings),
        _ratio(distance, kept + old),
        min(1.0, (kept + inner) / norms) if norms else 1.0,
        _ratio(dropped, target),
    )


def _ratio(square: float, whole: float) -> float:
    """The root of a part of `whole`; infinite where that is nothing, as the update of an adapter not yet trained."""
    return math.sqrt(square / whole) if square and whole else math.inf if square else 0.0
