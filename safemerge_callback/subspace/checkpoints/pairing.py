"""Do two checkpoints hold the same modules, in the same shapes? And what tells that their files have changed?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...adapters.names import is_vocabulary
from ...errors import SubspaceError
from ..header import DTYPES
from .quantised import format_of, quantised
from .shards import CheckpointShards
from .targets import select_targets


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


def num_bytes(checkpoint: CheckpointShards, name: str) -> int:
    """Return how many bytes one weight has in its checkpoint."""
    rows, columns = checkpoint.shape(name)
    return rows * columns * DTYPES[checkpoint.dtype(name)].itemsize


def stamps_of(checkpoint: CheckpointShards) -> list[str]:
    """Return name and time of change of the checkpoint's files on this machine, which the fingerprint leaves out."""
    paths = [getattr(file, "path", None) for file in checkpoint.located.files]
    return [f"{path.name} {path.stat().st_mtime_ns}" for path in paths if isinstance(path, Path)]
