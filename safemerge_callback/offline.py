"""The same verbs on adapter folders, without a model: measure one, or merge two into a third."""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .adapters import Adapter, load_adapter, save_adapter
from .adapters.files import CONFIG, WEIGHTS
from .decision import (
    VERSION,
    Edit,
    Journal,
    MergePlan,
    Readings,
    check_entry,
    check_gate,
    check_merge,
    measure,
    merge_entry,
    merged_factors,
)
from .errors import AdapterError, ConfigError, PlanError
from .methods import get_method
from .ops import LowRank
from .subspace import Subspace

_JOURNAL, _CARD = "safemerge.jsonl", "README.md"
_OWN_FILES = {CONFIG, WEIGHTS, _JOURNAL, _CARD}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


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
    safety: str | Path | Adapter | None,
    subspace: str | Path | Subspace,
    output: str | Path,
    *,
    gate: str = "threshold",
    threshold: float = 0.35,
    num_layers: int | None = None,
    method: str = "linear",
    space: str = "delta",
    weights: Sequence[float] = (0.8, 0.2),
    overwrite: bool = False,
    device: torch.device | str | None = None,
) -> MergePlan:
    """Merge `safety` into the modules of `finetuned` that the gate selects; return the plan that was carried out.

    Source: SafeMERGE, arXiv:2503.17239 (method `project`: Safe LoRA, arXiv:2405.16833, which needs no `safety`).
    Differs: each module is matched by name, and the default keeps the rank with the exact sum's best approximation.

    output: a new folder: a plain PEFT adapter, its journal `safemerge.jsonl` and a model card. Modules that were not
        selected are there to the bit. `cat` adds the ranks up (rank_pattern). It appears whole or not at all.
    overwrite: replace an `output` that holds such files and no others. The other knobs are those of `MergePlan`.
    Raises ConfigError for knobs or an output that cannot be, PlanError, AdapterError and SubspaceError for parts that
    do not fit; nothing is written then. Warns where the base models of the parts have different names.
    """
    began = time.perf_counter()
    knobs: dict[str, Any] = {
        "gate": gate,
        "threshold": threshold,
        "num_layers": num_layers,
        "method": method,
        "space": space,
    }
    _check_knobs(knobs, weights, safety)
    target = _free_output(output, [finetuned, safety, subspace], overwrite)
    task, matrices = _adapter(finetuned), _subspace(subspace)
    guard = None if safety is None else _adapter(safety)
    parts = _parts(task, guard, matrices)
    _warn_of_other_bases(task, guard, matrices)
    plan = MergePlan.decide(measure(task.factors, matrices, device=device), **knobs, weights=weights)
    decided = time.perf_counter()
    new, edits = merged_factors(plan, task.factors, guard, matrices, device)
    entries = _entries(plan, edits, parts, decided - began, time.perf_counter() - decided)
    _write(target, _with_factors(task, new), entries, _card(plan, edits, parts, task.base_model))
    return plan


def _adapter(given: str | Path | Adapter) -> Adapter:
    return given if isinstance(given, Adapter) else load_adapter(given)


def _subspace(given: str | Path | Subspace) -> Subspace:
    return given if isinstance(given, Subspace) else Subspace.load(given)


def _check_knobs(knobs: Mapping[str, Any], weights: Sequence[float], safety: object) -> None:
    check_gate(knobs["gate"], knobs["threshold"], knobs["num_layers"])
    check_merge(knobs["method"], knobs["space"], weights)
    if knobs["gate"] == "watch":
        raise ConfigError("gate 'watch' merges nothing: measure the adapter instead, or choose another gate.")
    if safety is None and "safety_adapter" in get_method(knobs["method"]).needs:
        raise PlanError(f"method {knobs['method']!r} needs a safety adapter, got none: give its folder or Hub id.")


def _free_output(output: str | Path, inputs: Iterable[object], overwrite: bool) -> Path:
    """The output folder, absolute; ConfigError where writing it could cost an input or somebody's files."""
    target = Path(output).expanduser().resolve()
    for given in inputs:
        source = getattr(given, "source", None) or getattr(given, "path", None) or given
        if source is not None and Path(str(source)).expanduser().resolve() == target:
            raise ConfigError(f"output {str(output)!r} is one of the inputs: give a new folder.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output {str(output)!r} is a file: give a new folder.")
    held = {path.name for path in target.iterdir()} if target.exists() else set()
    if held and not overwrite:
        raise ConfigError(f"output {str(output)!r} is not empty: give a new folder, or ask to overwrite it.")
    if foreign := sorted(held - _OWN_FILES):
        raise ConfigError(
            f"output {str(output)!r} holds {len(foreign)} things that are no part of an adapter, first {foreign[0]!r}: "
            "it is not overwritten. Give a new folder."
        )
    return target


def _with_factors(task: Adapter, new: Mapping[str, LowRank]) -> Adapter:
    """The fine-tuned adapter with the merged modules' factors, cast once to the dtype they had."""
    changed = {
        name: replace(task.factors[name], A=A.to(task.factors[name].A.dtype), B=B.to(task.factors[name].B.dtype))
        for name, (A, B) in new.items()
    }
    return replace(task, factors={**task.factors, **changed})


def _warn_of_other_bases(task: Adapter, safety: Adapter | None, subspace: Subspace) -> None:
    """Names are no proof either way (a copy may be called anything), so this warns and does not refuse."""
    bases = {
        "the fine-tuned adapter": task.base_model,
        "the safety adapter": safety.base_model if safety else None,
        "the subspace's aligned checkpoint": subspace.aligned.get("source"),
    }
    known = {who: Path(base).name for who, base in bases.items() if base}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{who}: {name!r}" for who, name in known.items())
        warnings.warn(f"safemerge: base models have different names ({listed}); they must be one", stacklevel=3)


def _parts(task: Adapter, safety: Adapter | None, subspace: Subspace) -> dict[str, str | None]:
    """What was put together, by Hub id or folder name; paths of this machine stay out of what may be published."""
    return {
        "finetuned": _shown(task.source),
        "safety_adapter": _shown(safety.source) if safety else None,
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
    left = plan.weights[0] if "safety_adapter" in get_method(plan.method).needs else 1.0
    merges = [merge_entry(0, plan, edits, dict.fromkeys(plan.selected, left), merging)] if edits else []
    end = {"kind": "end", "step": 0, "checks": 1, "merges": len(merges), "modules_merged": len(edits)}
    return [start, check_entry(0, plan, measuring), *merges, {**end, "seconds": measuring + merging}]


def _write(target: Path, merged: Adapter, entries: Iterable[Mapping[str, Any]], card: str) -> None:
    """Everything into a folder beside the target, which then takes its place; on a fault nothing is left."""
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        save_adapter(aside, merged)
        journal = Journal(aside / _JOURNAL)
        for entry in entries:
            journal.append(entry)
        (aside / _CARD).write_text(card, encoding="utf-8")
        _take_place(aside, target)
    except OSError as error:
        raise AdapterError(f"output {str(target)!r} cannot be written: {error}. Nothing was left there.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _take_place(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    old = aside.with_name(f"{aside.name}.old")
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _card(plan: MergePlan, edits: Sequence[Edit], parts: Mapping[str, str | None], base_model: str | None) -> str:
    """A model card: what was merged into what, by which rule, module by module."""
    knob = {"threshold": f" {plan.threshold:g}", "num_layers": f" {plan.num_layers}"}.get(plan.gate, "")
    how = f"{plan.method}, space {plan.space}, weights {plan.weights[0]:g} / {plan.weights[1]:g}"
    facts = {**parts, "gate": f"{plan.gate}{knob}", "method": how, "modules": f"{len(edits)} of {len(plan.readings)}"}
    rows = [f"| {key.replace('_', ' ')} | {_escaped(value)} |" for key, value in facts.items() if value]
    modules = [
        f"| {_escaped(e.name)} | {plan.readings[e.name].cosine:.4f} | {plan.readings[e.name].null_cosine:.4f} "
        f"| {e.change:.4f} | {e.residual:.4f} |"
        for e in edits
    ]
    head = ["| module | cosine | null cosine | change | residual |", "|---|---:|---:|---:|---:|"]
    lines = [_front_matter(base_model), "# Merged LoRA adapter\n", "## Safety merge\n", "| | |", "|---|---|", *rows, ""]
    lines += [*head, *modules] if modules else ["No module was selected: the weights are the fine-tuned adapter's."]
    return "\n".join([*lines, "", f"Every reading and reason is in `{_JOURNAL}`. {_CAVEAT}", ""])


_CAVEAT = (
    "The merge answers accidental loss of safety in fine-tuning; it does not withstand an attack: evaluate before use."
)


def _front_matter(base_model: str | None) -> str:
    # A JSON string is a YAML string. A local path is no model id, which the Hub would refuse.
    known = base_model is not None and _HUB_ID.fullmatch(base_model) and not Path(base_model).exists()
    base = f"base_model: {json.dumps(base_model)}\n" if known else ""
    return f"---\n{base}library_name: peft\ntags:\n- lora\n- safemerge\n---\n"


def _escaped(text: str) -> str:
    """`text` as one line of Markdown that renders as itself, inside a table too."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\](){}<>|~#&!$])", r"\\\1", one_line)
