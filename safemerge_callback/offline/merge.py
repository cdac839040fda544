"""Measure an adapter folder, or merge two into a third."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch

from ..adapters import Adapter, open_adapter
from ..adapters.stream_save import save_changed
from ..decision import (
    Edit,
    Gate,
    MergePlan,
    Readings,
    as_gate,
    check_merge,
    check_module_weights,
    check_soft,
    measure,
    merge_weights,
    merged_factors,
    method_of,
    nothing_selected,
    own_cosines,
)
from ..decision.fit import check_not_zero, needed_sources
from ..decision.gates import KNOB, Knobs
from ..decision.weights import pattern_of
from ..methods import get_method
from ..ops import LowRank
from ..record.entries import Sources, check_entry, end_entry, merge_entry, start_entry
from ..record.progress import Progress
from ..subspace import Subspace
from ..version import __version__
from .bake import BAKED_ADAPTER, BaseModel
from .card import model_card
from .merge_yaml import write_recipe
from .output import CARD, RECIPE, free_output, new_folder, write_journal
from .parts import (
    CHUNK_BYTES,
    Given,
    adapter_of,
    adapters_of,
    check_merges,
    chunks,
    copies_of_base,
    left_out,
    listed,
    named_parts,
    subspace_of,
    warn_of_other_bases,
)
from .small_files import copy_tokenizer


def measure_adapter(
    adapter: Given, subspace: str | Path | Subspace, *, device: torch.device | str | None = None
) -> Readings:
    """Return the reading of every module of an adapter folder or Hub id; no model is loaded.

    `device` None computes on the CPU. Raises AdapterError and SubspaceError for files that cannot be used or do not
    fit each other.
    """
    return measure(adapter_of(adapter).factors, subspace_of(subspace), device=device, batch_bytes=CHUNK_BYTES)


def merge_adapters(
    finetuned: Given,
    safety: Given | Sequence[Given] | None,
    subspace: str | Path | Subspace,
    output: str | Path,
    *,
    gate: str | Gate | None = None,
    method: str = "auto",
    space: str = "delta",
    weights: Sequence[float] | None = None,
    module_weights: Mapping[str, Sequence[float]] | None = None,
    strength: float | None = None,
    operator: str | None = None,
    operator_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    bake: str | Path | None = None,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    **knobs: Unpack[Knobs],
) -> MergePlan:
    """Merge `safety` into the modules of `finetuned` that the gate selects; return the plan that was carried out.

    Source: SafeMERGE, arXiv:2503.17239 (method `project`: Safe LoRA, arXiv:2405.16833, which needs no `safety`).
    Differs: each module is matched by name, and the default keeps the rank with the exact sum's best approximation.
    Modules are read, merged and written a few at a time, so memory does not grow with their number.

    safety: one adapter or several, each a folder, a Hub id or an `Adapter`; `weights` has one more than there are.
        Without any, method `auto` pulls the updates toward the aligned model.
    output: a new folder: a plain PEFT adapter, its journal `safemerge.jsonl`, a model card, and `safemerge.yaml`, which
        `safemerge merge --config` makes the same weights from. Modules that were not selected are there to the bit.
        `cat` adds the ranks up (rank_pattern). It appears whole or not at all.
    bake: the base model, a folder or Hub id: `output` is then a full checkpoint (`bake_adapter`), the adapter in its
        folder `adapter`.
    overwrite: replace an `output` that holds such files and no others. The other knobs are those of `MergePlan.decide`
        and of its gate (threshold, num_layers, ...).
    Raises ConfigError for knobs or an output that cannot be, PlanError, AdapterError and SubspaceError for parts that
    do not fit; nothing is written then. Warns where the base models of the parts have different names, and where the
    gate selects no module: the output is then the fine-tuned adapter as it was.
    """
    began = time.perf_counter()
    rule = as_gate(gate, knobs)
    given = listed(safety)
    how: dict[str, Any] = {
        "method": method_of(method, len(given), weights, module_weights, space),
        "space": space,
        "weights": weights,
        "strength": strength,
        "operator": operator,
        "operator_rank": operator_rank,
        "density": density,
        "majority_sign_method": majority_sign_method,
    }
    _check_knobs(rule, how, module_weights, len(given))
    base = None if bake is None else BaseModel.find(bake)
    target = free_output(output, [finetuned, *given, subspace, bake], overwrite, base.file_names if base else ())
    task, guards, matrices = adapter_of(finetuned), adapters_of(given), subspace_of(subspace)
    for guard in guards:
        check_not_zero(guard, list(guard.factors))
    parts = _fitting_parts(task, guards, matrices, base)
    readings = _readings(task, guards, matrices, rule, device)
    plan = MergePlan.decide(readings, gate=rule, module_weights=module_weights, **how)
    needed_sources(plan, guards, task.factors)
    if not plan.selected:
        warnings.warn(f"safemerge: {nothing_selected(plan)}", stacklevel=2)
    decided = time.perf_counter()
    with new_folder(target) as folder:
        at = folder if base is None else folder / BAKED_ADAPTER
        edits = _write_merged(at, plan, task, guards, matrices, device)
        entries = _entries(plan, edits, parts, decided - began, time.perf_counter() - decided)
        write_journal(folder, entries)
        (folder / CARD).write_text(
            model_card(plan, edits, parts, task.base_model, baked=base is not None), encoding="utf-8"
        )
        write_recipe(folder / RECIPE, target, (finetuned, given, subspace, bake), plan)
        _complete(folder, task, base, device)
    return plan


def _fitting_parts(
    task: Adapter, guards: Sequence[Adapter], subspace: Subspace, base: BaseModel | None
) -> dict[str, str | None]:
    """Name the parts; what forbids the baking is raised, and what is left out warned of, first of all."""
    if base is not None:
        base.blueprint(task)
    warn_of_other_bases(task, guards, subspace, level=4)
    left = left_out(guards, task.factors, base.tensor if base else copies_of_base(task), level=4)
    return {**named_parts(task, guards, subspace), "left_out": left}


def _complete(folder: Path, task: Adapter, base: BaseModel | None, device: torch.device | str | None) -> None:
    """Add what belongs beside the merged adapter: its tokenizer, or where it is baked the whole of the model."""
    if base is None:
        copy_tokenizer(task.folder, folder)
    else:
        # The merged weights under the name and beside the files of what the user gave.
        merged = open_adapter(folder / BAKED_ADAPTER)
        base.bake(replace(merged, source=task.source, folder=task.folder), folder, device)


def _check_knobs(
    rule: Gate, how: Mapping[str, Any], module_weights: Mapping[str, Sequence[float]] | None, adapters: int
) -> None:
    """Refuse before anything is read what no adapter could make right."""
    plan = MergePlan.decide(Readings(()), gate="all", **how)
    check_soft(rule.soft, plan.method, plan.space)
    check_merges(rule, plan.method, has_safety=adapters > 0)
    if adapters:
        check_merge(
            plan.method, plan.space, merge_weights(plan.method, how["weights"], how["strength"], adapters), adapters
        )
        check_module_weights(plan.method, plan.space, module_weights, adapters)


def _readings(
    task: Adapter, guards: Sequence[Adapter], subspace: Subspace, rule: Gate, device: torch.device | str | None
) -> Readings:
    own = None
    if guards and rule.name == "reference":
        own = own_cosines(guards[0], task.factors, subspace, device=device, batch_bytes=CHUNK_BYTES)
    return measure(task.factors, subspace, device=device, gate=rule, reference=own, batch_bytes=CHUNK_BYTES)


def _write_merged(
    folder: Path,
    plan: MergePlan,
    task: Adapter,
    guards: Sequence[Adapter],
    subspace: Subspace,
    device: torch.device | str | None,
) -> tuple[Edit, ...]:
    """Merge and write the adapter, a run of modules at a time; return the edits in the order of the readings."""
    edits: list[Edit] = []
    grown = 0 if get_method(plan.method).keeps_rank else 1
    ranks = {n: task.factors[n].rank + grown * sum(g.factors[n].rank for g in guards) for n in plan.selected}

    def merged() -> Iterator[tuple[str, LowRank]]:
        needs = get_method(plan.method).needs
        for run in chunks(plan.selected, task, subspace if "subspace" in needs else None):
            part = {name: task.factors[name] for name in run}
            new, done = merged_factors(_part(plan, run), part, guards, subspace, device)
            edits.extend(done)
            yield from new.items()

    save_changed(folder, task, ranks, merged())
    return tuple(edits)


def _part(plan: MergePlan, names: Sequence[str]) -> MergePlan:
    """The plan of some of its modules, decided already: no interval must prove it again by the readings of all."""
    readings = Readings(replace(plan.readings[name], interval=None) for name in names)
    own = {pattern_of(name, plan.module_weights) for name in names}
    weights = {pattern: numbers for pattern, numbers in plan.module_weights.items() if pattern in own}
    return replace(plan, readings=readings, verdicts={n: plan.verdicts[n] for n in names}, module_weights=weights)


def _entries(
    plan: MergePlan, edits: Sequence[Edit], parts: Mapping[str, str | None], measuring: float, merging: float
) -> list[dict[str, Any]]:
    config = {name: getattr(plan, name) for name in ("gate", "threshold", "num_layers", "method", "space", "weights")}
    config |= plan.taken | ({"module_weights": dict(plan.module_weights)} if plan.module_weights else {})
    if plan.gate in KNOB:
        config[KNOB[plan.gate]] = plan.rule.knob
    sources = Sources(parts["subspace"], parts["aligned"], parts["unaligned"])
    versions = {"torch": torch.__version__, "safemerge-callback": __version__}
    start = start_entry(0, {**parts, **config}, versions, sources, len(plan.readings))
    left = {name: plan.task_weight_of(name) for name in plan.selected}
    merges = [merge_entry(0, plan, edits, left, merging)] if edits else []
    counts = Progress(checks=1, merges=len(merges), modules_merged=len(edits))
    return [start, check_entry(0, plan, measuring), *merges, end_entry(0, counts, measuring + merging)]
