"""What a cell runs with, resolved in full and checked before the first cell starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from recipes.arguments import PREFIX
from recipes.finetune import parse_finetune
from recipes.models import placed
from safemerge_callback.adapters import load_adapter
from safemerge_callback.corrections.schedule import merge_events
from safemerge_callback.decision import Choices, as_gate, needs_of
from safemerge_callback.decision.gates.rule import gate_knobs
from safemerge_callback.errors import ConfigError, SafeMergeError, nearest
from safemerge_callback.evaluation import load_judge
from safemerge_callback.evaluation.judges import check_ready
from safemerge_callback.io.choices import one_of
from safemerge_callback.methods import as_how
from safemerge_callback.methods.how import how_knobs
from safemerge_callback.offline.check_data import ModelRows, check_rows
from safemerge_callback.offline.search import METHODS
from safemerge_callback.signals.coefficients import SearchSettings
from safemerge_callback.training.config.settings import SafeMergeConfig

from .arms import MERGES, Arm
from .grid import Grid, GridCell, parent_of
from .rows import row_files

# Settings of `merge_adapters` besides the knobs of its gate, and what they are where an arm does not say. The study's
# own, whatever the defaults become and whatever knobs are added: published cells are known by the digest of these.
MERGE: dict[str, Any] = {
    "safety": None,
    "gate": "threshold",
    "method": "linear",
    "space": "delta",
    "weights": None,
    "module_weights": None,
    "strength": None,
    "operator": None,
    "operator_rank": None,
    "density": None,
    "majority_sign_method": "total",
}
# What a merge asks a model about, and the settings of a search.
_ASKS = ("task_rows", "safety_rows", "base")
SEARCH = tuple(knob.name for knob in fields(SearchSettings))
# What a training cell owns: an arm that gave these would not be the cell that its name says.
_MODEL = ("model", "model_name_or_path")
_CELL_KEYS = ("output_dir", "data", "poisoned_share", "seed", "mixing_seed")
# Those of a merge where nothing is said.
_WEIGHTS = (0.8, 0.2)
_SCHEDULE = ("every", "from_step", "until_step", "cooldown", "at_train_end", "asynchronous")


def folder_of(grid: Grid, cell: GridCell) -> Path:
    """Return the cell's folder."""
    return Path(grid.output_dir) / "cells" / cell.name


def adapter_of(grid: Grid, cell: GridCell) -> Path | None:
    """Return the folder of the adapter that the cell evaluates; None for a model as it is."""
    return None if cell.arm.kind == "model" else folder_of(grid, cell) / "adapter"


def resolved(grid: Grid, cell: GridCell) -> dict[str, Any]:
    """Return all that the cell runs with, JSON-able: a file for recipes/finetune.py, or the arguments of the merge."""
    if cell.arm.kind == "model":
        return {"model": cell.arm.settings.get("model", grid.model)}
    if cell.arm.kind in MERGES:
        return _merge_settings(grid, cell)
    of_the_cell = {
        "output_dir": str(adapter_of(grid, cell)),
        "data": cell.task,
        "poisoned_share": cell.poisoned_share,
        "seed": cell.seed,
        "mixing_seed": cell.seed,
    }
    return {"model_name_or_path": grid.model, **_train_settings(grid, cell.arm, cell), **of_the_cell}


def _train_settings(grid: Grid, arm: Arm, cell: GridCell) -> dict[str, Any]:
    # transformers refuses bf16 without an accelerator unless it is told that there is none.
    settings = {"use_cpu": _on_cpu(), **grid.finetune, **grid.by_task.get(cell.task, {}), **arm.settings}
    return {key: _placed(grid, cell, value) for key, value in settings.items()}


def _on_cpu() -> bool:
    import torch

    return not torch.accelerator.is_available()


def _merge_settings(grid: Grid, cell: GridCell) -> dict[str, Any]:
    parent = parent_of(grid, cell)
    assert parent is not None, "checked when the arms were read"
    knobs = {"subspace": "{subspace}", **_unsaid(grid, cell.arm), **cell.arm.settings}
    if cell.arm.total_weight_of:
        knobs["weights"] = total_weights(_train_settings(grid, grid.arms[cell.arm.total_weight_of], cell))
    files = {"finetuned": str(adapter_of(grid, parent)), "output": str(adapter_of(grid, cell))}
    return {**files, **{key: _placed(grid, cell, value) for key, value in knobs.items()}}


def _unsaid(grid: Grid, arm: Arm) -> dict[str, Any]:
    """What a merge is made with where its arm does not say; one that asks a model asks the grid's."""
    asks = {"base": grid.model} if "task_rows" in arm.settings or "safety_rows" in arm.settings else {}
    return {**(MERGE if arm.kind == "posthoc" else {"safety": None}), **asks}


def _placed(grid: Grid, cell: GridCell, value: Any) -> Any:
    """The value, with the grid's own files and the cell's seed where it names them."""
    if isinstance(value, list):
        return [_placed(grid, cell, one) for one in value]
    if isinstance(value, Mapping):
        return {key: _placed(grid, cell, one) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    if value == "{seed}":
        return cell.seed
    files = {name: getattr(grid, name) for name in ("subspace", "random_subspace", "foreign_rows")}
    for name, path in {**files, **row_files(grid, cell)}.items():
        value = value.replace("{" + name + "}", str(path))
    return value


def total_weights(settings: Mapping[str, Any]) -> list[float]:
    """Return the weights of one merge that leaves as much of the task's update as all merges of a run do.

    A run that merges n times with weights (w, v) leaves wⁿ of what was there before the first, and has added v·(1 + w
    + ... + wⁿ⁻¹) of the safety update. Later steps' updates pass fewer merges, so the run leaves more of those.
    """
    knobs = {key.removeprefix(PREFIX): value for key, value in settings.items() if key.startswith(PREFIX)}
    task, safety = knobs.get("weights") or _WEIGHTS
    if knobs.get("spread_weights"):
        return [task, safety]
    times = {"every": SafeMergeConfig.every, **{key: knobs[key] for key in _SCHEDULE if key in knobs}}
    events = len(merge_events(int(settings["max_steps"]), **times))
    return [round(task**events, 6), round(safety * sum(task**i for i in range(events)), 6)]


def check_cells(grid: Grid, cells: Sequence[GridCell]) -> None:
    """Raise ConfigError, naming the cell, where its settings cannot be, or a model or an adapter is not to be had."""
    check_ready(load_judge(judge) for judge in grid.evaluate["judges"])
    with tempfile.TemporaryDirectory() as folder:
        # Cells of one arm and task differ by seed and share alone: one of them stands for all.
        alike = {(cell.arm.name, cell.task): cell for cell in reversed(cells)}
        for cell in alike.values():
            try:
                _check(grid, cell, Path(folder) / "cell.yaml")
            except (SafeMergeError, ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"cell {cell.name!r} cannot run: {error}") from error


def _check(grid: Grid, cell: GridCell, file: Path) -> None:
    if cell.arm.kind == "train" and (keys := [key for key in _CELL_KEYS if key in cell.arm.settings]):
        raise ConfigError(f"settings {keys} are the cell's own: drop them from arm {cell.arm.name!r}")
    settings = resolved(grid, cell)
    _check_parts(*(str(settings[key]) for key in _MODEL if settings.get(key)), adapters=_adapters(settings))
    if cell.arm.kind == "train":
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        parse_finetune(["--config", str(file)])
    elif cell.arm.kind == "posthoc":
        _check_merge(settings)
    elif cell.arm.kind == "search":
        _check_search(settings)
    elif unknown := sorted(set(cell.arm.settings) - {"model"}):
        raise ConfigError(f"settings {unknown} mean nothing to kind model: give none, or model")


def _adapters(settings: Mapping[str, Any]) -> list[str]:
    """The safety adapters that a cell names: one, or a list."""
    named = settings.get("safety") or settings.get(f"{PREFIX}safety_adapter") or []
    return [named] if isinstance(named, str) else list(named)


def _check_parts(*models: str, adapters: Sequence[str]) -> None:
    for name in models:
        _read_config(name)
    for name in adapters:
        _read_adapter(name)


@cache
def _read_config(model: str) -> None:
    from transformers import AutoConfig

    try:
        place, pinned = placed(model)
        AutoConfig.from_pretrained(place, **pinned)
    except OSError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"model {model!r} cannot be read ({first}): give a packaged name, a folder or a Hub id"
        ) from None


@cache
def _read_adapter(name: str) -> None:
    load_adapter(name)


def _check_merge(settings: Mapping[str, Any]) -> None:
    knobs = {key: value for key, value in settings.items() if key in gate_knobs()}
    _check_keys(settings, {*MERGE, *gate_knobs(), *how_knobs(), *_ASKS})
    gate = as_gate(settings["gate"], knobs)
    of_the_method = {name: settings[name] for name in how_knobs() if settings.get(name) is not None}
    how = as_how(settings["method"], of_the_method)
    if not gate.merges:
        raise ConfigError(f"gate {gate.name!r} merges nothing: it is the parent's cell; choose another gate")
    if "safety_adapter" in needs_of(how, gate) and settings["safety"] is None:
        raise ConfigError("safety is missing: give the folder or Hub id of the safety adapter")
    check_rows(Choices(gate, how), ModelRows(settings.get("task_rows"), settings.get("safety_rows")))


def _check_search(settings: Mapping[str, Any]) -> None:
    _check_keys(settings, {*SEARCH, *_ASKS, "safety", "method", "rows"})
    if missing := [name for name in ("task_rows", "safety_rows") if name not in settings]:
        raise ConfigError(
            f"{missing[0]} is missing: a search reads rows of both kinds; give a file, or {{{missing[0]}}}"
        )
    SearchSettings(**{name: settings[name] for name in SEARCH if name in settings})
    one_of(settings.get("method", METHODS[0]), METHODS, "method")


def _check_keys(settings: Mapping[str, Any], allowed: Iterable[str]) -> None:
    allowed = {*allowed, "finetuned", "output", "subspace"}
    for key in settings:
        if key not in allowed:
            raise ConfigError(
                f"setting {key!r} is unknown{nearest(key, allowed, then=f'choose among {sorted(allowed)}')}"
            )
