"""Do two checkpoints hold the same modules, in the same shapes? And what tells that their files have changed?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import SubspaceError
from ..header import DTYPES
from .shards import CheckpointShards

# Modules with one row a token.
_VOCABULARY = re.compile(
    r"(.+\.)?(embed_tokens|embed_in|tok_embeddings|word_embeddings|wte|shared|lm_head|embed_out|output)"
)


def require_same_modules(
    aligned: CheckpointShards, unaligned: CheckpointShards, names: Sequence[str], *, common_rows: bool = False
) -> None:
    """Raise SubspaceError unless both hold `names` in equal shapes and in dtypes that V can be computed from.

    With `common_rows`, embeddings and output heads may differ in height.
    """
    for one, other in ((aligned, unaligned), (unaligned, aligned)):
        missing = [name for name in names if name not in one.names]
        if missing:
            raise SubspaceError(
                f"{len(missing)} of {len(names)} modules are missing in checkpoint {one.located.name!r} but present in "
                f"{other.located.name!r}, first {missing[0]!r}. Are both of one model? Else narrow target_modules."
            )
    for name in names:
        _require_same_shape(aligned, unaligned, name, common_rows)
        for checkpoint in (aligned, unaligned):
            _require_plain_dtype(checkpoint, name)


def _require_same_shape(aligned: CheckpointShards, unaligned: CheckpointShards, name: str, common_rows: bool) -> None:
    shape, other = aligned.shape(name), unaligned.shape(name)
    vocabulary = shape[1] == other[1] and bool(_VOCABULARY.fullmatch(name))
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


def _require_plain_dtype(checkpoint: CheckpointShards, name: str) -> None:
    if checkpoint.dtype(name) not in DTYPES:
        raise SubspaceError(
            f"module {name!r} is stored as {checkpoint.dtype(name)} in checkpoint {checkpoint.located.name!r}, a "
            f"quantised format; allowed are {', '.join(DTYPES)}. Use the unquantised checkpoint."
        )


def num_bytes(checkpoint: CheckpointShards, name: str) -> int:
    """Return how many bytes one weight has in its checkpoint."""
    rows, columns = checkpoint.shape(name)
    return rows * columns * DTYPES[checkpoint.dtype(name)].itemsize


def stamps_of(checkpoint: CheckpointShards) -> list[str]:
    """Return name and time of change of the checkpoint's files on this machine, which the fingerprint leaves out."""
    paths = [getattr(file, "path", None) for file in checkpoint.located.files]
    return [f"{path.name} {path.stat().st_mtime_ns}" for path in paths if isinstance(path, Path)]
