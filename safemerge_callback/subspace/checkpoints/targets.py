"""Which modules belong in the subspace: selected as by PEFT's `target_modules`, and in both checkpoints alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ...adapters.names import is_vocabulary
from ...errors import SubspaceError, nearest, shown
from ...io.patterns import as_pattern
from .quantised import format_of, quantised
from .shards import CheckpointShards

ALL_LINEAR = "all-linear"
_HEADS_AND_EMBEDDINGS = {"lm_head", "wte", "wpe", "shared", "embeddings"}
# Linear layers that only sound like an embedding: `patch_embedding`, `embeddings_project`.
_PROJECTS = re.compile(r"patch_embed|_proj|mapping")
# Experts and the router before them: since transformers 5 they are bare parameters in the model, no linear layers. A
# router spelled `router` is a linear layer in some models (Llama 4, Phi MoE), and small in all.
_EXPERT_OR_ROUTER = re.compile(r"(^|\.)(experts\.\d+\.[^.]+|mlp\.gate)$")


def is_linear(name: str) -> bool:
    """Return whether a canonical name is a linear layer of the model: no embedding, output head, expert or router."""
    last = name.rpartition(".")[2]
    embedding = last in _HEADS_AND_EMBEDDINGS or ("embed" in last and not _PROJECTS.search(last))
    return not embedding and not _EXPERT_OR_ROUTER.search(name)


def select_targets(names: Mapping[str, str], target_modules: Sequence[str] | str | None) -> list[str]:
    """Return the canonical names that `target_modules` selects, sorted by layer.

    `names` maps canonical names to checkpoint keys. None or "all-linear": every linear layer but the output head, as in
    PEFT; single experts (`experts.0.up_proj`) are taken only where they are asked for. A list: a name, or a suffix of
    whole dotted parts. A string: a regular expression that must match the whole canonical name or the whole module
    path of the checkpoint. Raises SubspaceError for an entry that matches nothing.
    """
    if target_modules is None or (isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR):
        chosen = [name for name in names if is_linear(name)]
        if not chosen:
            raise SubspaceError("the checkpoint has no linear layer besides embeddings, output head and experts.")
    elif isinstance(target_modules, str):
        chosen = _by_regex(names, target_modules)
    elif isinstance(target_modules, Iterable) and all(isinstance(name, str) for name in target_modules):
        chosen = _by_suffix(names, list(target_modules))
    else:
        raise SubspaceError(f"target_modules is {shown(target_modules)}: give names, a regular expression, or nothing.")
    return sorted(chosen, key=_layer_order)


def _by_regex(names: Mapping[str, str], pattern: str) -> list[str]:
    compiled = as_pattern(pattern, "target_modules", error=SubspaceError)
    chosen = [
        name
        for name, key in names.items()
        if compiled.fullmatch(name) or compiled.fullmatch(key.removesuffix(".weight"))
    ]
    if not chosen:
        raise SubspaceError(
            f"target_modules {pattern!r} matches none of {len(names)} modules as a regular expression (the whole name "
            f"must match, e.g. {next(iter(names), '')!r}); pass a list to match by suffix."
        )
    return chosen


def _matches(name: str, key: str, target: str) -> bool:
    path = key.removesuffix(".weight")
    return target in (name, path) or path.endswith(f".{target}") or name.endswith(f".{target}")


def _by_suffix(names: Mapping[str, str], targets: Sequence[str]) -> list[str]:
    chosen: dict[str, None] = {}
    for target in targets:
        modules = [name for name, key in names.items() if _matches(name, key, target)]
        if not modules:
            raise SubspaceError(
                f"target_modules entry {target!r} matches none of {len(names)} modules"
                f"{nearest(target, _last_parts(names), then='choose among ' + ', '.join(_last_parts(names)))}"
            )
        chosen.update(dict.fromkeys(modules))
    if not chosen:
        raise SubspaceError("target_modules is an empty list; leave it out to take every linear layer.")
    return list(chosen)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _layer_order(name: str) -> list[tuple[int, int, str]]:
    """Sort layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def require_same_modules(
    aligned: CheckpointShards, unaligned: CheckpointShards, names: Sequence[str], *, common_rows: bool = False
) -> None:
    """Raise SubspaceError unless both hold `names` in equal shapes and as plain floats that V can be computed from.

    With `common_rows`, embeddings and output heads may differ in height.
    """
    # First: what is packed has another name or shape too, and those would be told instead.
    for checkpoint in (aligned, unaligned):
        checkpoint.require_plain(names)
    for one, other in ((aligned, unaligned), (unaligned, aligned)):
        missing = [name for name in names if name not in one.names]
        if missing and (how := format_of(one.located.config)):
            raise quantised(f"checkpoint {one.located.name!r}", how, missing, len(names))
        if missing:
            raise SubspaceError(
                f"{len(missing)} of {len(names)} modules are missing in checkpoint {one.located.name!r} but present in "
                f"{other.located.name!r}, first {missing[0]!r}. Are both of one model? Else narrow target_modules."
            )
    for name in names:
        _require_same_shape(aligned, unaligned, name, common_rows)


def _require_same_shape(aligned: CheckpointShards, unaligned: CheckpointShards, name: str, common_rows: bool) -> None:
    shape, other = aligned.shape(name), unaligned.shape(name)
    vocabulary = shape[1] == other[1] and is_vocabulary(name)
    if shape == other or (vocabulary and common_rows):
        return
    advice = (
        "Do both vocabularies begin alike? Then common_rows=True (--common-rows) takes the rows that both have."
        if vocabulary
        else "Both checkpoints must be of one model. Else narrow target_modules."
    )
    raise SubspaceError(
        f"module {name!r} is {shape} in {aligned.located.name!r} but {other} in {unaligned.located.name!r}. {advice}"
    )


def common_targets(
    aligned: CheckpointShards, unaligned: CheckpointShards, target_modules: Sequence[str] | str | None
) -> list[str]:
    """Return the modules of either checkpoint that `target_modules` selects, the quantised ones among them.

    Raises SubspaceError where there is none to select, because the checkpoints are quantised or of themselves.
    """
    there = {**unaligned.names, **aligned.names}
    packed = {name: name for checkpoint in (unaligned, aligned) for name in checkpoint.quantised}
    try:
        return select_targets({**packed, **there}, target_modules)
    except SubspaceError as error:
        for checkpoint in (aligned, unaligned):
            if how := format_of(checkpoint.located.config):
                raise quantised(f"checkpoint {checkpoint.located.name!r}", how, [], len(there)) from error
        raise
