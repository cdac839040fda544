"""A merge as a YAML file: read with every key checked, and written beside the result so that it can be made again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters import Adapter
from ..decision import MergePlan
from ..decision.gates import gate_knobs
from ..decision.weights import weights_knobs
from ..errors import ConfigError, nearest, shown
from ..io.documents import read_yaml
from ..io.paths import as_path, existing
from ..methods.aliases import without_alias
from ..methods.how import how_knobs
from ..subspace import Subspace

# What a file may say: the parts, and the knobs of `merge_adapters`.
PARTS = ("finetuned", "safety", "subspace", "output", "bake", "task_rows", "safety_rows", "base")


def keys() -> tuple[str, ...]:
    """Return every key that a file may have."""
    how = ("gate", "method", "combination_type", *how_knobs(), *weights_knobs())
    return (*PARTS, *how, *_gate_keys(), "force", "allow_empty", "device")


def _gate_keys() -> tuple[str, ...]:
    """The knobs of gates that mean something to a merge of files, which happens once."""
    return tuple(name for name in gate_knobs() if name not in ("step", "rearm"))


def gate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `settings` that is a gate and its knobs."""
    return {name: value for name, value in settings.items() if name == "gate" or name in _gate_keys()}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return what a YAML file says of a merge, its relative paths resolved against the folder that it lies in.

    A part that is no path there is left as it is: a Hub id. Raises ConfigError for a file that is none, and for a key
    that no merge has, with the nearest one.
    """
    settings = read_yaml(path, f"config {shown(path)}", advice="Give a YAML file")
    file = as_path(path, "config")
    if not isinstance(settings, dict):
        raise ConfigError(f"config {str(path)!r} holds no settings: write `key: value` lines, keys among {keys()}")
    unknown = [key for key in settings if key not in keys()]
    if unknown:
        hint = nearest(str(unknown[0]), keys(), then=f"choose among {keys()}")
        raise ConfigError(f"config {str(path)!r} has the key {unknown[0]!r}, which is unknown{hint}")
    for part in set(PARTS) & settings.keys():
        settings[part] = _resolved(part, settings[part], file.parent)
    return without_alias(settings)


def _resolved(key: str, source: Any, folder: Path) -> Any:
    if isinstance(source, list) and key == "safety":
        return [_resolved(key, one, folder) for one in source]
    if source is None:
        return None
    new = key == "output"
    there = folder / as_path(source, f"config: {key}")
    return str(there) if new or existing(there) else source


def write_recipe(
    path: Path, target: Path, parts: Sequence[Any], plan: MergePlan, rows: Mapping[str, Any] | None = None
) -> None:
    """Write the YAML from which `safemerge merge --config` makes the same weights: all knobs, none left to a default.

    `parts`: fine-tuned adapter, list of safety adapters, subspace and base model or None; `rows`: what the model was
    asked about, and the base that it was loaded from, where that is so. Paths are relative to
    `target`, the folder where the file will lie, so that nothing is said of the machine.
    """
    import yaml

    finetuned, safety, subspace, bake = parts
    settings: dict[str, Any] = {"finetuned": _address(finetuned, target)}
    if safety:
        settings["safety"] = (
            [_address(one, target) for one in safety] if len(safety) > 1 else _address(safety[0], target)
        )
    settings["subspace"] = _address(subspace, target)
    if bake is not None:
        settings["bake"] = _address(bake, target)
    settings |= {name: _address(part, target) for name, part in (rows or {}).items() if isinstance(part, str | Path)}
    settings |= _knobs(plan)
    path.write_text(
        "# safemerge merge --config safemerge.yaml -o OUT\n" + yaml.safe_dump(settings, sort_keys=False),
        encoding="utf-8",
    )


def _knobs(plan: MergePlan) -> dict[str, Any]:
    gate, how = plan.gate, plan.how
    settings: dict[str, Any] = {"gate": gate.name}
    settings |= {name: value for name in _gate_keys() if (value := gate.reads.get(name)) is not None}
    settings |= {"seed": gate.seed, **({"soft": True} if gate.soft else {})}
    settings |= {"method": how.method, "space": how.space}
    if how.kind.strength is not None:
        settings["strength"] = how.strength
    elif how.kind.weighted:
        settings["weights"] = list(how.weights)
    return settings | plan.noted | how.taken


def _address(part: Any, target: Path) -> str:
    text = part.source if isinstance(part, Adapter) else part.source if isinstance(part, Subspace) else str(part)
    there = existing(text)
    return text if there is None else os.path.relpath(there.resolve(), target)
