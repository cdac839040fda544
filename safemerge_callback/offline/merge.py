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
from ..adapters.checkpoint import save_changed
from ..decision import (
    Edit,
    Gate,
    MergePlan,
    Readings,
    choose,
    cosines_needed,
    measure,
    merged_factors,
    nothing_selected,
)
from ..decision.choices import PlanKnobs, check_counts
from ..decision.fit import check_not_zero, needed_sources
from ..methods.how import AUTO, How
from ..ops import Grams, LowRank
from ..record.entries import Sources, check_entry, end_entry, merge_entry, start_entry
from ..record.entries.checks import gate_entry, how_entry
from ..record.progress import Progress
from ..subspace import Subspace
from ..version import __version__
from .bake import BAKED_ADAPTER, BaseModel
from .check_data import ModelRows, check_data, check_rows, with_signals
from .merge_yaml import write_recipe
from .output import CARD, RECIPE, free_output, model_card, new_folder, write_journal
from .parts import (
    CHUNK_BYTES,
    AdapterSource,
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
    adapter: AdapterSource, subspace: str | Path | Subspace, *, device: torch.device | str | None = None
) -> Readings:
    """Return the reading of every module of an adapter folder or Hub id; no model is loaded.

    `device` None computes on the CPU. Raises AdapterError and SubspaceError for files that cannot be used or do not
    fit each other.
    """
    return measure(adapter_of(adapter).factors, subspace_of(subspace), device=device, batch_bytes=CHUNK_BYTES)


def merge_adapters(
    finetuned: AdapterSource,
    safety: AdapterSource | Sequence[AdapterSource] | None,
    subspace: str | Path | Subspace,
    output: str | Path,
    *,
    gate: str | Gate | None = None,
    method: str | How = AUTO,
    bake: str | Path | None = None,
    task_rows: Any = None,
    safety_rows: Any = None,
    base: str | None = None,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    **knobs: Unpack[PlanKnobs],
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
    task_rows, safety_rows: prompts with responses, as `load_rows` takes them, where gate, method or rules ask the model
        (`safety_slope`, `regmean`): it is loaded then, `base` (None: what the adapter's config names) with the adapter.
    overwrite: replace an `output` that holds such files and no others. The other knobs are those of `MergePlan.decide`
        and of its gate (threshold, num_layers, ...).
    Raises ConfigError for knobs or an output that cannot be, PlanError, AdapterError and SubspaceError for parts that
    do not fit; nothing is written then. Warns where the base models of the parts have different names, and where the
    gate selects no module: the output is then the fine-tuned adapter as it was.
    """
    began = time.perf_counter()
    sources = listed(safety)
    choices = choose(gate, method, knobs, len(sources))
    check_merges(choices, has_safety=bool(sources))
    rows = ModelRows(task_rows, safety_rows, base)
    check_rows(choices, rows)
    if sources:
        check_counts(choices, len(sources))
    baked = None if bake is None else BaseModel.find(bake)
    target = free_output(output, [finetuned, *sources, subspace, bake], overwrite, baked.file_names if baked else ())
    task, safety_adapters, matrices = adapter_of(finetuned), adapters_of(sources), subspace_of(subspace)
    for safety_adapter in safety_adapters:
        check_not_zero(safety_adapter, list(safety_adapter.factors))
    parts = _fitting_parts(task, safety_adapters, matrices, baked)
    data = check_data(task, safety_adapters, choices, rows, device)
    readings = with_signals(_readings(task, safety_adapters, matrices, choices.gate, device), data, choices)
    plan = MergePlan.of(readings, choices)
    needed_sources(plan, safety_adapters, task.factors)
    if not plan.selected:
        warnings.warn(f"safemerge: {nothing_selected(plan)}", stacklevel=2)
    decided = time.perf_counter()
    with new_folder(target) as folder:
        at = folder if baked is None else folder / BAKED_ADAPTER
        edits = _write_merged(at, plan, task, safety_adapters, matrices, device, data.grams if data else None)
        entries = _entries(plan, edits, parts, decided - began, time.perf_counter() - decided)
        write_journal(folder, entries)
        (folder / CARD).write_text(
            model_card(plan, edits, parts, task.base_model, baked=baked is not None), encoding="utf-8"
        )
        write_recipe(folder / RECIPE, target, (finetuned, sources, matrices, bake), plan, rows.named)
        _complete(folder, task, baked, device)
    return plan


def _fitting_parts(
    task: Adapter, safety_adapters: Sequence[Adapter], subspace: Subspace, base: BaseModel | None
) -> dict[str, str | None]:
    """Name the parts; what forbids the baking is raised, and what is left out warned of, first of all."""
    if base is not None:
        base.blueprint(task)
    warn_of_other_bases(task, safety_adapters, subspace, level=4)
    left = left_out(safety_adapters, task.factors, base.tensor if base else copies_of_base(task), level=4)
    return {**named_parts(task, safety_adapters, subspace), "left_out": left}


def _complete(folder: Path, task: Adapter, base: BaseModel | None, device: torch.device | str | None) -> None:
    """Add what belongs beside the merged adapter: its tokenizer, or where it is baked the whole of the model."""
    if base is None:
        copy_tokenizer(task.folder, folder)
    else:
        # The merged weights under the name and beside the files of what the user gave.
        merged = open_adapter(folder / BAKED_ADAPTER)
        base.bake(replace(merged, source=task.source, folder=task.folder), folder, device)


def _readings(
    task: Adapter, safety_adapters: Sequence[Adapter], subspace: Subspace, gate: Gate, device: torch.device | str | None
) -> Readings:
    cosines = cosines_needed([gate], safety_adapters, task.factors, subspace, device=device, batch_bytes=CHUNK_BYTES)
    return measure(task.factors, subspace, device=device, gate=gate, reference=cosines, batch_bytes=CHUNK_BYTES)


def _write_merged(
    folder: Path,
    plan: MergePlan,
    task: Adapter,
    safety_adapters: Sequence[Adapter],
    subspace: Subspace,
    device: torch.device | str | None,
    grams: Mapping[str, Grams] | None,
) -> tuple[Edit, ...]:
    """Merge and write the adapter, a run of modules at a time; return the edits in the order of the readings."""
    edits: list[Edit] = []
    grown = 0 if plan.how.kind.keeps_rank else 1
    ranks = {n: task.factors[n].rank + grown * sum(g.factors[n].rank for g in safety_adapters) for n in plan.selected}

    def merged() -> Iterator[tuple[str, LowRank]]:
        for run in chunks(plan.selected, task, subspace if "subspace" in plan.how.needs else None):
            part = {name: task.factors[name] for name in run}
            new, done = merged_factors(_part(plan, run), part, safety_adapters, subspace, device, grams)
            edits.extend(done)
            yield from new.items()

    save_changed(folder, task, ranks, merged())
    return tuple(edits)


def _part(plan: MergePlan, names: Sequence[str]) -> MergePlan:
    """The plan of some of its modules, decided already: no interval must prove it again by the readings of all."""
    readings = Readings(replace(plan.readings[name], interval=None) for name in names)
    verdicts = {name: plan.verdicts[name] for name in names}
    return replace(plan, readings=readings, verdicts=verdicts, weights={name: plan.weights[name] for name in names})


def _entries(
    plan: MergePlan, edits: Sequence[Edit], parts: Mapping[str, str | None], measuring: float, merging: float
) -> list[dict[str, Any]]:
    config = gate_entry(plan.gate) | how_entry(plan)
    sources = Sources(parts["subspace"], parts["aligned"], parts["unaligned"])
    versions = {"torch": torch.__version__, "safemerge-callback": __version__}
    start = start_entry(0, {**parts, **config}, versions, sources, len(plan.readings))
    left = {name: plan.task_weight_of(name) for name in plan.selected}
    merges = [merge_entry(0, plan, edits, left, merging)] if edits else []
    counts = Progress(checks=1, merges=len(merges), modules_merged=len(edits))
    return [start, check_entry(0, plan, measuring), *merges, end_entry(0, counts, measuring + merging)]
