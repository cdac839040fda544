"""Measure an adapter folder, or merge two into a third."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch

from .. import __version__
from ..adapters import Adapter, load_adapter
from ..decision import (
    VERSION,
    Edit,
    Gate,
    MergePlan,
    Readings,
    as_gate,
    check_entry,
    check_merge,
    check_module_weights,
    check_operator,
    check_soft,
    measure,
    merge_entry,
    merge_weights,
    merged_factors,
    own_cosines,
)
from ..decision.gates import KNOB, Knobs
from ..errors import ConfigError, PlanError
from ..methods import check_density, check_majority_sign, get_method
from ..ops import LowRank
from ..subspace import Subspace
from .card import model_card
from .output import free_output, write_output


def measure_adapter(
    adapter: str | Path | Adapter, subspace: str | Path | Subspace, *, device: torch.device | str | None = None
) -> Readings:
    """Return the reading of every module of an adapter folder or Hub id; no model is loaded.

    `device` None computes on the CPU. Raises AdapterError and SubspaceError for files that cannot be used or do not
    fit each other.
    """
    return measure(_adapter(adapter).factors, _subspace(subspace), device=device)


def merge_adapters(
    finetuned: str | Path | Adapter,
    safety: str | Path | Adapter | Sequence[str | Path | Adapter] | None,
    subspace: str | Path | Subspace,
    output: str | Path,
    *,
    gate: str | Gate = "threshold",
    method: str = "linear",
    space: str = "delta",
    weights: Sequence[float] | None = None,
    module_weights: Mapping[str, Sequence[float]] | None = None,
    strength: float | None = None,
    operator: str | None = None,
    operator_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    overwrite: bool = False,
    device: torch.device | str | None = None,
    **knobs: Unpack[Knobs],
) -> MergePlan:
    """Merge `safety` into the modules of `finetuned` that the gate selects; return the plan that was carried out.

    Source: SafeMERGE, arXiv:2503.17239 (method `project`: Safe LoRA, arXiv:2405.16833, which needs no `safety`).
    Differs: each module is matched by name, and the default keeps the rank with the exact sum's best approximation.

    output: a new folder: a plain PEFT adapter, its journal `safemerge.jsonl` and a model card. Modules that were not
        selected are there to the bit. `cat` adds the ranks up (rank_pattern). It appears whole or not at all.
    safety: one adapter or several, with a weight each after that of `finetuned`; negative to take one away.
    overwrite: replace an `output` that holds such files and no others. The other knobs are those of `MergePlan` and of
        its gate (threshold, num_layers, ...).
    Raises ConfigError for knobs or an output that cannot be, PlanError, AdapterError and SubspaceError for parts that
    do not fit; nothing is written then. Warns where the base models of the parts have different names.
    """
    began = time.perf_counter()
    rule = as_gate(gate, knobs)
    given = _several(safety)
    asked = _check_knobs(rule, method, space, merge_weights(method, weights, strength, len(given)), given)
    check_module_weights(method, space, module_weights, len(asked) - 1)
    check_operator(method, operator, operator_rank)
    check_density(method, density)
    check_majority_sign(method, majority_sign_method)
    target = free_output(output, [finetuned, *given, subspace], overwrite)
    task, matrices = _adapter(finetuned), _subspace(subspace)
    guards = [_adapter(source) for source in given]
    parts = _parts(task, guards, matrices)
    _warn_of_other_bases(task, guards, matrices)
    own = own_cosines(guards[0], task.factors, matrices, device=device) if rule.name == "reference" else None
    readings = measure(task.factors, matrices, device=device, gate=rule, reference=own)
    plan = MergePlan.decide(
        readings,
        gate=rule,
        method=method,
        space=space,
        weights=asked,
        module_weights=module_weights,
        operator=operator,
        operator_rank=operator_rank,
        density=density,
        majority_sign_method=majority_sign_method,
    )
    decided = time.perf_counter()
    new, edits = merged_factors(plan, task.factors, guards, matrices, device)
    entries = _entries(plan, edits, parts, decided - began, time.perf_counter() - decided)
    write_output(target, _with_factors(task, new), entries, model_card(plan, edits, parts, task.base_model))
    return plan


def _adapter(given: str | Path | Adapter) -> Adapter:
    """The adapter, its modules in the order of their layers: a file has layer 10 before layer 2."""
    adapter = given if isinstance(given, Adapter) else load_adapter(given)
    return replace(adapter, factors=dict(sorted(adapter.factors.items(), key=lambda item: _natural(item[0]))))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _subspace(given: str | Path | Subspace) -> Subspace:
    return given if isinstance(given, Subspace) else Subspace.load(given)


def _several(given: str | Path | Adapter | Sequence[str | Path | Adapter] | None) -> list[str | Path | Adapter]:
    if given is None:
        return []
    return [given] if isinstance(given, str | Path | Adapter) else list(given)


def _check_knobs(
    rule: Gate, method: str, space: str, weights: Sequence[float], safety: Sequence[object]
) -> tuple[float, ...]:
    asked = check_merge(method, space, weights, len(safety) or None)
    check_soft(rule.soft, method, space)
    if rule.name == "watch":
        raise ConfigError("gate 'watch' merges nothing: measure the adapter instead, or choose another gate.")
    if "average" in get_method(method).needs:
        raise ConfigError(f"method {method!r} goes to the average of a run's own updates: use it in training.")
    if not safety and "safety_adapter" in get_method(method).needs:
        raise PlanError(f"method {method!r} needs a safety adapter, got none: give its folder or Hub id.")
    if not safety and rule.name == "reference":
        raise PlanError(
            "gate 'reference' compares with a safety adapter's cosines, got none: give its folder or Hub id."
        )
    return asked


def _with_factors(task: Adapter, new: Mapping[str, LowRank]) -> Adapter:
    """The fine-tuned adapter with the merged modules' factors, cast once to the dtype they had."""
    changed = {
        name: replace(task.factors[name], A=A.to(task.factors[name].A.dtype), B=B.to(task.factors[name].B.dtype))
        for name, (A, B) in new.items()
    }
    return replace(task, factors={**task.factors, **changed})


def _warn_of_other_bases(task: Adapter, safety: Sequence[Adapter], subspace: Subspace) -> None:
    """Names are no proof either way (a copy may be called anything), so this warns and does not refuse."""
    bases = {
        "the fine-tuned adapter": task.base_model,
        **{f"the safety adapter {_shown(source.source)!r}": source.base_model for source in safety},
        "the subspace's aligned checkpoint": subspace.aligned.get("source"),
    }
    known = {who: Path(base).name for who, base in bases.items() if base}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{who}: {name!r}" for who, name in known.items())
        warnings.warn(f"safemerge: base models have different names ({listed}); they must be one", stacklevel=3)


def _parts(task: Adapter, safety: Sequence[Adapter], subspace: Subspace) -> dict[str, str | None]:
    """What was put together, by Hub id or folder name; paths of this machine stay out of what may be published."""
    return {
        "finetuned": _shown(task.source),
        "safety_adapter": ", ".join(_shown(source.source) for source in safety) or None,
        "subspace": subspace.path.name,
        "aligned": subspace.aligned.get("source"),
        "unaligned": subspace.unaligned.get("source") or subspace.unaligned.get("alignment_adapter"),
    }


def _shown(source: str) -> str:
    return Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source


def _entries(
    plan: MergePlan, edits: Sequence[Edit], parts: Mapping[str, str | None], measuring: float, merging: float
) -> list[dict[str, Any]]:
    config = {name: getattr(plan, name) for name in ("gate", "threshold", "num_layers", "method", "space", "weights")}
    config |= plan.taken | ({"module_weights": dict(plan.module_weights)} if plan.module_weights else {})
    if plan.gate in KNOB:
        config[KNOB[plan.gate]] = plan.rule.knob
    sources = {"path": parts["subspace"], "aligned": parts["aligned"], "unaligned": parts["unaligned"]}
    start = {
        "kind": "start",
        "version": VERSION,
        "step": 0,
        "config": {**parts, **config},
        "versions": {"torch": torch.__version__, "safemerge-callback": __version__},
        "subspace": sources,
        "num_modules": len(plan.readings),
    }
    left = {name: plan.task_weight_of(name) for name in plan.selected}
    merges = [merge_entry(0, plan, edits, left, merging)] if edits else []
    end = {"kind": "end", "step": 0, "checks": 1, "merges": len(merges), "modules_merged": len(edits)}
    return [start, check_entry(0, plan, measuring), *merges, {**end, "seconds": measuring + merging}]
