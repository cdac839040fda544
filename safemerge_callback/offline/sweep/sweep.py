"""What merges would do, over gates × weights × methods, before one is made; no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...adapters import Adapter
from ...decision import (
    Gate,
    MergePlan,
    Readings,
    as_gate,
    check_merge,
    check_safety_adapter,
    measure,
    merged_factors,
    method_of,
    own_cosines,
)
from ...errors import ConfigError, PlanError
from ...methods import Method, get_method
from ...ops import LowRank, full_precision
from ...subspace import Subspace
from ..parts import CHUNK_BYTES, Given, adapter_of, adapters_of, chunks, copies_of_base, left_out, subspace_of
from .small_space import Moved, fits_core, in_core, moved, moved_in_core
from .table import Cell, Sweep

# Every module, and eight cosines around the released SafeMERGE's 0.35.
GATES = (
    Gate("all"),
    *(Gate("threshold", threshold=cosine) for cosine in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55)),
)
Device = torch.device | str | None
# Knobs of a merge beside its gate, and what it would do to each module, in numbers.
Column = tuple[dict[str, Any], dict[str, Moved]]
# Modules of equal ranks: names, live cores, cores of the others, and scalings, (n).
Core = tuple[list[str], LowRank, list[LowRank], torch.Tensor]


def sweep_adapters(
    finetuned: Given,
    safety: Given | Sequence[Given] | None,
    subspace: str | Path | Subspace,
    *,
    gates: Sequence[str | Gate] = GATES,
    weights: Sequence[Sequence[float]] = ((0.8, 0.2),),
    methods: Sequence[str] = ("auto",),
    space: str = "delta",
    density: float | None = None,
    majority_sign_method: str = "total",
    device: torch.device | str | None = None,
) -> Sweep:
    """Return what merging `safety` into `finetuned` would do for every gate, method and weights.

    A gate is a `Gate` with its knobs, or the name of one. Modules are measured once, and each is reduced once to
    factors of rank Σ r (`in_core`); every cell is then r × r arithmetic. Methods that work entry by entry, and
    `project`, are carried out instead, module by module, and take as long as so many merges. `space` and `density` go
    to the methods that know them. The figures are those of `merge`.
    Source: none.

    Raises ConfigError for knobs that cannot be and for gates with soft weights, which differ by gate; otherwise as
    `merge_adapters`.
    """
    guards = adapters_of(safety)
    named = [method_of(method, len(guards)) for method in methods]
    merges = _merges(named, weights, space, density, majority_sign_method)
    rules = [as_gate(gate, {}) for gate in gates]
    _check(rules, merges, guards)
    task, matrices = adapter_of(finetuned), subspace_of(subspace)
    left_out(guards, task.factors, copies_of_base(task), level=3)
    readings = _readings(task, guards, matrices, rules, device)
    columns = _columns(merges, readings, task, guards, matrices, device)
    return Sweep((_cell(gate, how, table, readings) for gate in rules for how, table in columns), readings)


def _merges(
    methods: Sequence[str], weights: Sequence[Sequence[float]], space: str, density: float | None, sign: str
) -> list[dict[str, Any]]:
    """The knobs of each column, checked; one that a method does not read is left out of its own."""
    found = []
    for name in dict.fromkeys(methods):
        method = get_method(name)
        how: dict[str, Any] = {"method": name, "space": space if space in method.spaces else method.spaces[0]}
        if "density" in method.takes:
            how["density"] = density
        if "majority_sign_method" in method.takes:
            how["majority_sign_method"] = sign
        # One column of a method to which weights mean nothing.
        for numbers in weights if method.weighted else [None]:
            plan = MergePlan.decide(Readings(()), gate="all", **{**how, "weights": numbers})
            found.append({**how, "density": plan.density, "weights": plan.weights})
    return found


def _check(gates: Sequence[Gate], merges: Sequence[Mapping[str, Any]], guards: Sequence[Adapter]) -> None:
    if not gates or not merges:
        raise ConfigError("a sweep needs at least one gate, one method and one list of weights, got none: give one")
    for gate in gates:
        if gate.soft or gate.name == "watch":
            what = "soft weights differ with the gate" if gate.soft else "gate 'watch' merges nothing"
            raise ConfigError(f"gate {str(gate)!r} cannot be swept: {what}. Leave it out, and use `merge`.")
    for how in merges:
        method = get_method(how["method"])
        if "average" in method.needs:
            raise ConfigError(f"method {method.name!r} goes to the average of a run's own updates: it cannot be swept.")
        if method.weighted:
            check_merge(method.name, how["space"], how["weights"], len(guards) or None)
    needing = [f"method {how['method']!r}" for how in merges if get_method(how["method"]).weighted]
    needing += [f"gate {gate.name!r}" for gate in gates if gate.name == "reference"]
    if not guards and needing:
        raise PlanError(f"{needing[0]} needs a safety adapter, got none: give its folder or Hub id.")


def _readings(
    task: Adapter, guards: Sequence[Adapter], subspace: Subspace, gates: Sequence[Gate], device: Device
) -> Readings:
    own = None
    for guard in guards:
        check_safety_adapter(guard, task.factors)
    if guards and any(gate.name == "reference" for gate in gates):
        own = own_cosines(guards[0], task.factors, subspace, device=device, batch_bytes=CHUNK_BYTES)
    return measure(task.factors, subspace, device=device, reference=own, batch_bytes=CHUNK_BYTES)


@full_precision()
def _columns(
    merges: Sequence[dict[str, Any]],
    readings: Readings,
    task: Adapter,
    guards: Sequence[Adapter],
    subspace: Subspace,
    device: Device,
) -> list[Column]:
    """Each merge's knobs, and what it would do to every module with finite weights, by name."""
    names = [name for name, reading in readings.items() if reading.finite]
    small = any(fits_core(get_method(how["method"])) for how in merges)
    cores = _cores(names, task, guards) if small else []
    columns = []
    for how in merges:
        method = get_method(how["method"])
        if fits_core(method):
            parts = (
                _by_name(run, moved_in_core(method, live, others, scaling, how)) for run, live, others, scaling in cores
            )
        else:
            parts = (
                _made(how, run, readings, task, guards, subspace, device)
                for run in _runs(method, names, task, subspace)
            )
        columns.append((how, {name: row for part in parts for name, row in part.items()}))
    return columns


def _cores(names: Sequence[str], task: Adapter, guards: Sequence[Adapter]) -> list[Core]:
    """All modules in their cores, stacked where the ranks agree: a few kilobytes each."""
    groups: dict[tuple[int, ...], list[tuple[str, list[LowRank], float]]] = {}
    for name in names:
        live = task.factors[name]
        updates = [LowRank(live.A, live.B), *(guard.factors[name].low_rank(unit=live.scaling) for guard in guards)]
        groups.setdefault(tuple(u.A.shape[0] for u in updates), []).append((name, in_core(updates), live.scaling))
    found = []
    for group in groups.values():
        own, *others = (
            LowRank(*(torch.stack(t) for t in zip(*u, strict=True))) for u in zip(*(g[1] for g in group), strict=True)
        )
        scaling = torch.tensor([g[2] for g in group], dtype=own.A.dtype)
        found.append(([g[0] for g in group], own, others, scaling))
    return found


def _by_name(names: Sequence[str], found: Moved) -> dict[str, Moved]:
    rows = torch.stack([*found]).T.tolist()
    return {name: Moved(*row) for name, row in zip(names, rows, strict=True)}


def _runs(method: Method, names: Sequence[str], task: Adapter, subspace: Subspace) -> Iterator[list[str]]:
    yield from chunks(names, task, subspace if "subspace" in method.needs else None)


def _made(
    how: Mapping[str, Any],
    names: Sequence[str],
    readings: Readings,
    task: Adapter,
    guards: Sequence[Adapter],
    subspace: Subspace,
    device: Device,
) -> dict[str, Moved]:
    """The same of merges that are carried out, and thrown away."""
    plan = MergePlan.decide(Readings(readings[name] for name in names), gate="all", **how)
    factors = {name: task.factors[name] for name in names}
    new, edits = merged_factors(plan, factors, guards, subspace, device)
    found = {}
    for edit in edits:
        old = factors[edit.name]
        residual, scaling = torch.tensor([edit.residual, old.scaling], dtype=torch.float64)
        row = moved(LowRank(old.A, old.B), LowRank(*(t.cpu() for t in new[edit.name])), residual, scaling)
        found[edit.name] = Moved(*(float(value) for value in row))
    return found


def _cell(gate: Gate, how: Mapping[str, Any], table: Mapping[str, Moved], readings: Readings) -> Cell:
    plan = MergePlan.decide(readings, gate=gate, **how)
    chosen = [table[name] for name in plan.selected]
    kept = sum(r.update_norm**2 for n, r in readings.items() if r.finite and not plan.verdicts[n].merge)
    old, new, inner, distance, target, dropped = (
        (sum(column) for column in zip(*chosen, strict=True)) if chosen else (0.0,) * 6
    )
    norms = math.sqrt((kept + old) * (kept + new))
    return Cell(
        plan.gate,
        plan.rule.knob,
        plan.method,
        plan.space,
        plan.weights,
        len(chosen),
        len(readings),
        _ratio(distance, kept + old),
        min(1.0, (kept + inner) / norms) if norms else 1.0,
        _ratio(dropped, target),
    )


def _ratio(square: float, whole: float) -> float:
    """The root of a part of `whole`; infinite where that is nothing, as the update of an adapter not yet trained."""
    return math.sqrt(square / whole) if square and whole else math.inf if square else 0.0
