"""A smaller companion of a subspace file: V in eight bits a value, or cut to a rank, with proven bounds on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, SubspaceError, shown
from ..io.choices import one_of
from ..io.numbers import is_whole
from ..ops import Int8, full_precision
from .approximate import proven, quantised, truncated
from .bar import byte_bar
from .file import Subspace
from .header import PROBE_POSITIONS, PROBES, FileHeader, ModuleHeader
from .stream import SafetensorsStream, reserve_for

COMPRESSED = ("int8", "truncated")
DEFAULT_RANK = 64


@full_precision()
def compress_subspace(
    source: str | Path | Subspace,
    output: str | Path,
    kind: str = "int8",
    rank: int | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Subspace:
    """Write a compressed companion of the exact subspace file `source` to `output`, and return it opened.

    Keep both files in one folder: a module whose decision the compressed one does not prove is read from the exact one.

    kind: `int8`, each row times 127 over its largest entry, rounded half to even; or `truncated`, V ≈ U·W.
    rank: of `truncated`, 64 by default. device: where the arithmetic is done, in float64.
    A module of which the compressed form would take no fewer bytes, such as one stored as factors, stays as it is.
    One module is in memory at a time, and for the proof twice n² float64, n the smaller side of V.
    Raises ConfigError for a kind or rank that cannot be, SubspaceError for a source that is compressed
    itself, or an output that may not be replaced.
    """
    _check(kind, rank)
    exact = source if isinstance(source, Subspace) else Subspace.load(source)
    header = _header(exact)
    total = sum(module.bytes(name) for name, module in exact.modules.items())
    with (
        SafetensorsStream(output, _reserve(header, exact), inputs=[exact.path]) as stream,
        byte_bar("compressing subspace", total, 0, shown=progress) as advance,
    ):
        for name, before in exact.modules.items():
            after, tensors = _compressed(exact, name, kind, rank or DEFAULT_RANK, torch.device(device))
            keys = list(after.tensors(name))
            sums = {key: stream.append(key, tensor) for key, tensor in zip(keys, tensors, strict=True)}
            header.modules[name] = replace(after, checksums=sums)
            advance(name, before.bytes(name))
        for key in (PROBE_POSITIONS, PROBES) if header.probed else ():
            header.checksums[key] = stream.append(key, exact.tensors([key])[0])
        stream.finish(header.to_metadata())
    return Subspace.load(output)


def _check(kind: str, rank: int | None) -> None:
    one_of(kind, COMPRESSED, "kind")
    if rank is not None and (kind != "truncated" or not is_whole(rank, 1)):
        raise ConfigError(
            f"rank={shown(rank)}, kind {kind!r}: a rank is a whole number, 1 or more, and for 'truncated' only."
        )


def _header(exact: Subspace) -> FileHeader:
    """The header of the file to write, still without modules."""
    if exact.compressed:
        raise SubspaceError(
            f"subspace {str(exact.path)!r} is compressed already: give the exact file it was made from."
        )
    origin = {"file": exact.path.name, "sha256": exact.fingerprint}
    return replace(exact.header, modules={}, checksums={}, exact=origin)


def _compressed(
    exact: Subspace, name: str, kind: str, rank: int, device: torch.device
) -> tuple[ModuleHeader, Sequence[Tensor]]:
    """The header and tensors of a module: compressed, or as they are where that takes no fewer bytes."""
    before = exact.modules[name]
    shape = {"int8": (None, "int8"), "truncated": (min(rank, *before.shape), "float32")}[kind]
    after = replace(before, kind=kind, rank=shape[0], dtype=shape[1])
    stored = exact.tensors(list(before.tensors(name)))
    if before.kind != "dense" or after.bytes(name) >= before.bytes(name):
        return before, stored
    V = stored[0].to(device)
    near = quantised(V) if kind == "int8" else truncated(V, min(rank, *before.shape))
    bounds = proven(V, near)
    tensors = (near.Q, near.scale[:, 0]) if isinstance(near, Int8) else near
    return replace(after, error=bounds.error, cross=bounds.cross), tensors


def _reserve(header: FileHeader, exact: Subspace) -> int:
    """Header bytes for the widest outcome: every number at its longest, every module of two tensors."""
    long = -1.2345678901234567e-300
    widest = {
        name: replace(
            module,
            kind="truncated",
            rank=10**15,
            dtype="bfloat16",
            error=long,
            cross=long,
            checksums=dict.fromkeys((f"{name}.scale", f"{name}.scale."), "0" * 64),
        )
        for name, module in exact.modules.items()
    }
    sums = dict.fromkeys((PROBES, PROBE_POSITIONS), "0" * 64)
    keys = [key for name in widest for key in (f"{name}.scale", f"{name}.Q")]
    return reserve_for(replace(header, modules=widest, checksums=sums).to_metadata(), [*keys, *sums])
