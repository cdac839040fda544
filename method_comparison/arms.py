"""An arm: what is done to a model, by name; read from YAML and refused where it cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from safemerge_callback.errors import ConfigError, nearest

Kind = Literal["model", "train", "posthoc", "search"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Those that merge the adapter of another arm.
MERGES: tuple[Kind, ...] = ("posthoc", "search")


@dataclass(frozen=True)
class Arm:
    """One arm of the grid.

    kind: `train` is a run of recipes/finetune.py, `settings` what differs from the grid's own; `posthoc` merges the
        adapter of the arm `parent`, `settings` are those of `safemerge_callback.offline.merge_adapters`; `search` does
        it with coefficients that rows choose, by `search_merge` and its `SearchSettings`; `model` evaluates the grid's
        model as it is, or the one that `settings` names as `model`.
    family: the front that this is a point of, its own name where nothing is said: several strengths of one method are
        one arm in the comparison.
    total_weight_of: a `train` arm; its total task weight over all merges becomes this arm's one merge's.
    seeds, tasks, poisoned_shares: where they are not the grid's.
    """

    name: str
    kind: Kind = "train"
    about: str = ""
    family: str = ""
    parent: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    total_weight_of: str | None = None
    seeds: tuple[int, ...] | None = None
    tasks: tuple[str, ...] | None = None
    poisoned_shares: tuple[float, ...] | None = None


_KEYS = {f.name for f in fields(Arm)} - {"name"} | {"points"}


def read_arms(raw: Mapping[str, Any]) -> dict[str, Arm]:
    """Return the arms of a YAML mapping, name -> keys, in its order, each of `points` an arm `NAME.POINT` of its own.

    Raises ConfigError for unknown keys and kinds, and for parents that are lacking, unknown or no `train` arm.
    """
    arms: dict[str, Arm] = {}
    for name, keys in raw.items():
        for arm in _points(str(name), keys or {}):
            arms[arm.name] = arm
    for arm in arms.values():
        _check_parent(arm, arms)
    return arms


def _points(name: str, keys: Mapping[str, Any]) -> list[Arm]:
    for key in keys:
        if key not in _KEYS:
            raise ConfigError(
                f"arm {name!r}: key {key!r} is unknown{nearest(key, _KEYS, then=f'choose among {sorted(_KEYS)}')}"
            )
    kind = keys.get("kind", "train")
    if kind not in KINDS:
        raise ConfigError(
            f"arm {name!r}: kind {kind!r} is unknown{nearest(str(kind), KINDS, then=f'choose one of {list(KINDS)}')}"
        )
    lists = {key: tuple(keys[key]) for key in ("seeds", "tasks", "poisoned_shares") if keys.get(key) is not None}
    rest = {key: value for key, value in keys.items() if key not in lists and key not in ("points", "settings")}
    settings = dict(keys.get("settings") or {})
    points = keys.get("points")
    if not points:
        return [Arm(**{"family": name, **rest, "name": name, "settings": settings, **lists})]
    return [
        Arm(**{"family": name, **rest, "name": f"{name}.{point}", "settings": {**settings, **more}, **lists})
        for point, more in points.items()
    ]


def _check_parent(arm: Arm, arms: Mapping[str, Arm]) -> None:
    for key, other in (("parent", arm.parent), ("total_weight_of", arm.total_weight_of)):
        if other is None:
            continue
        if arm.kind not in MERGES:
            raise ConfigError(
                f"arm {arm.name!r}: {key} is for kind {' and '.join(MERGES)}, and this is kind {arm.kind}: drop it"
            )
        if other not in arms:
            raise ConfigError(
                f"arm {arm.name!r}: {key} {other!r} is no arm"
                f"{nearest(other, arms, then=f'choose among {sorted(arms)}')}"
            )
        if arms[other].kind != "train":
            raise ConfigError(f"arm {arm.name!r}: {key} {other!r} is kind {arms[other].kind}: name one that trains")
    if arm.kind in MERGES and arm.parent is None:
        raise ConfigError(
            f"arm {arm.name!r} is kind {arm.kind} and names no parent: give the arm whose adapter it merges"
        )


def chosen(arms: Mapping[str, Arm], only: Sequence[str]) -> list[str]:
    """Return the arms that `only` names and their parents; `end` names all of its points, `end.w4` and the others.

    ConfigError for a name that none has.
    """
    if not only:
        return list(arms)
    points_of = {name: name.partition(".")[0] for name in arms}
    names = [*arms, *points_of.values()]
    for name in only:
        if name not in names:
            raise ConfigError(
                f"arm {name!r} is unknown{nearest(name, names, then=f'choose among {sorted(set(names))}')}"
            )
    wanted = {name for name, of in points_of.items() if {name, of} & set(only)}
    wanted |= {parent for name in wanted if (parent := arms[name].parent)}
    return [name for name in arms if name in wanted]
