"""A merge as a YAML file: read with every key checked, and written beside the result so that it can be made again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters import Adapter
from ..decision import MergePlan
from ..decision.gates import KNOBS
from ..errors import ConfigError, nearest, shown
from ..io.documents import read_yaml
from ..io.paths import as_path, existing
from ..methods import get_method
from ..methods.aliases import without_alias
from ..subspace import Subspace

# What a file may say: the parts, and the knobs of `merge_adapters`.
PARTS = ("finetuned", "safety", "subspace", "output", "bake")
_HOW = (
    "gate",
    "method",
    "space",
    "combination_type",
    "weights",
    "module_weights",
    "strength",
    "operator",
    "operator_rank",
    "density",
    "majority_sign_method",
)
_GATE = tuple(name for name in KNOBS if name not in ("step", "rearm"))
KEYS = (*PARTS, *_HOW, *_GATE, "force", "allow_empty", "device")


def gate_knobs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `settings` that is a gate and its knobs."""
    return {name: value for name, value in settings.items() if name == "gate" or name in _GATE}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return what a YAML file says of a merge, its relative paths resolved against the folder that it lies in.

    A part that is no path there is left as it is: a Hub id. Raises ConfigError for a file that is none, and for a key
    that no merge has, with the nearest one.
    """
    found = read_yaml(path, f"config {shown(path)}", advice="Give a YAML file")
    file = as_path(path, "config")
    if not isinstance(found, dict):
        raise ConfigError(f"config {str(path)!r} holds no settings: write `key: value` lines, keys among {KEYS}")
    unknown = [key for key in found if key not in KEYS]
    if unknown:
        hint = nearest(str(unknown[0]), KEYS, then=f"choose among {KEYS}")
        raise ConfigError(f"config {str(path)!r} has the key {unknown[0]!r}, which is unknown{hint}")
    for part in set(PARTS) & found.keys():
        found[part] = _resolved(part, found[part], file.parent)
    return without_alias(found)


def _resolved(key: str, given: Any, folder: Path) -> Any:
    if isinstance(given, list) and key == "safety":
        return [_resolved(key, one, folder) for one in given]
    if given is None:
        return None
    new = key == "output"
    there = folder / as_path(given, f"config: {key}")
    return str(there) if new or existing(there) else given


def write_recipe(path: Path, target: Path, parts: Sequence[Any], plan: MergePlan) -> None:
    """Write the YAML from which `safemerge merge --config` makes the same weights: all knobs, none left to a default.

    `parts`: fine-tuned adapter, list of safety adapters, subspace and base model or None. Paths are relative to
    `target`, the folder where the file will lie, so that nothing is said of the machine.
    """
    import yaml

    finetuned, safety, subspace, bake = parts
    told: dict[str, Any] = {"finetuned": _told(finetuned, target)}
    if safety:
        told["safety"] = [_told(one, target) for one in safety] if len(safety) > 1 else _told(safety[0], target)
    told["subspace"] = _told(subspace, target)
    if bake is not None:
        told["bake"] = _told(bake, target)
    told |= _knobs(plan)
    path.write_text(
        "# safemerge merge --config safemerge.yaml -o OUT\n" + yaml.safe_dump(told, sort_keys=False), encoding="utf-8"
    )


def _knobs(plan: MergePlan) -> dict[str, Any]:
    rule, method = plan.rule, get_method(plan.method)
    told: dict[str, Any] = {"gate": rule.name}
    told |= {name: value for name in _GATE if (value := rule.reads.get(name)) is not None}
    told |= {"seed": rule.seed, **({"soft": True} if rule.soft else {})}
    told |= {"method": plan.method, "space": plan.space}
    if method.strength is not None:
        told["strength"] = plan.weights[1]
    elif method.weighted:
        told["weights"] = list(plan.weights)
    if plan.module_weights:
        told["module_weights"] = {pattern: list(own) for pattern, own in plan.module_weights.items()}
    return told | {name: value for name, value in plan.taken.items() if name != "seed"}


def _told(given: Any, target: Path) -> str:
    text = (
        given.source if isinstance(given, Adapter) else str(given.path) if isinstance(given, Subspace) else str(given)
    )
    there = existing(text)
    return text if there is None else os.path.relpath(there.resolve(), target)
