"""Build a subspace file, module by module, with a few of the largest tensors in memory and never a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, SubspaceError
from ..ops import Factored, full_precision, null_cosine
from .file import Subspace
from .header import PROBE_POSITIONS, PROBES, FileHeader, ModuleHeader, dtype_name
from .sources import AlignmentAdapter, CheckpointPair, Material, Source
from .stream import SafetensorsStream, reserve_for


@full_precision()
def build_subspace(
    output: str | Path,
    *,
    aligned: str | Path | None = None,
    unaligned: str | Path | None = None,
    alignment_adapter: str | Path | None = None,
    target_modules: Sequence[str] | str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Subspace:
    """Write V = W_aligned - W_unaligned of every chosen module to `output`, and return it opened.

    Source: the alignment matrix of Safe LoRA (arXiv:2405.16833). Differs: V itself is stored and never V·Vᵀ,
    modules are matched by name, and at most a few tensors are in memory.

    output: the file to write (safetensors); it appears only when it is whole.
    aligned, unaligned: two checkpoints of one architecture: folders, `.safetensors` files or Hub ids.
    alignment_adapter: instead of `unaligned`, a LoRA adapter whose update s·B·A is V; `aligned`, if given beside it, is
        the model it was trained on, and only serves to recognise that model later.
    target_modules: as in PEFT: a list of names or suffixes, a regular expression, or None for every linear layer
        besides embeddings and output head (for an adapter: every module it has).
    device: where the arithmetic is done. progress: show a bar on stderr.

    V is subtracted in float32 (float64 for float64 sources) and stored in a source's dtype where that is bit-exact, as
    factors where rank <= 64 leaves a relative residual <= 1e-5, in float32 otherwise.
    Raises ConfigError for a contradiction between arguments, SubspaceError for unusable sources or output.
    """
    source = _open_source(aligned, unaligned, alignment_adapter, target_modules)
    header = FileHeader(source.aligned, source.unaligned)
    probes: list[tuple[Tensor, Tensor]] = []
    with SafetensorsStream(output, _reserve(source)) as stream:
        for name in _with_bar(source.names, progress):
            _add(name, source.read(name, torch.device(device)), source.shape(name), stream, header, probes)
        _require_something(header)
        if probes:
            stream.append(PROBE_POSITIONS, torch.stack([positions for positions, _ in probes]))
            stream.append(PROBES, torch.stack([values for _, values in probes]))
        stream.finish(header.to_metadata())
    return Subspace.load(output)


def _open_source(
    aligned: str | Path | None,
    unaligned: str | Path | None,
    alignment_adapter: str | Path | None,
    target_modules: Sequence[str] | str | None,
) -> Source:
    if alignment_adapter is not None:
        if unaligned is not None:
            raise ConfigError("alignment_adapter and unaligned exclude each other: V is s·B·A, or a difference.")
        return AlignmentAdapter(alignment_adapter, aligned, target_modules)
    if aligned is None or unaligned is None:
        lacking = " and ".join(n for n, v in (("aligned", aligned), ("unaligned", unaligned)) if v is None)
        raise ConfigError(f"{lacking} not given: pass both aligned and unaligned, or alignment_adapter.")
    return CheckpointPair(aligned, unaligned, target_modules)


def _add(
    name: str,
    material: Material,
    shape: tuple[int, int],
    stream: SafetensorsStream,
    header: FileHeader,
    probes: list[tuple[Tensor, Tensor]],
) -> None:
    """Write one module's tensors and note it in the header; a V of zero is only noted."""
    matrix = material.matrix
    if material.norm == 0:
        header.unmoved.append(name)
        return
    factored = isinstance(matrix, Factored)
    header.modules[name] = ModuleHeader(
        shape=shape,
        kind="factor" if factored else "dense",
        rank=matrix.U.shape[1] if isinstance(matrix, Factored) else None,
        dtype=dtype_name(material.dtype),
        norm=material.norm,
        null_cosine=float(null_cosine(matrix)),
    )
    tensors = matrix if isinstance(matrix, Factored) else (matrix,)
    for key, tensor in zip(header.modules[name].tensors(name), tensors, strict=True):
        stream.append(key, tensor, material.dtype)
    if material.probe_positions is not None and material.probe_values is not None:
        probes.append((material.probe_positions, material.probe_values))
        header.probed.append(name)


def _require_something(header: FileHeader) -> None:
    if not header.modules:
        raise SubspaceError(
            f"aligned and unaligned are equal at all {len(header.unmoved)} modules, first {header.unmoved[0]!r}: there "
            "is nothing to project on. Give two different checkpoints, or an adapter that was trained."
        )


def _reserve(source: Source) -> int:
    """Header bytes for the widest outcome: every module a factor, every number at its longest."""
    big = 10**15
    widest = ModuleHeader((big, big), "factor", big, "bfloat16", -1.2345678901234567e-300, -1.2345678901234567e-300)
    header = FileHeader(source.aligned, source.unaligned, dict.fromkeys(source.names, widest))
    header.probed = source.names
    tensors = [key for name in source.names for key in (f"{name}.V", f"{name}.U", f"{name}.W")]
    return reserve_for(header.to_metadata(), [*tensors, PROBES, PROBE_POSITIONS])


def _with_bar(names: Sequence[str], progress: bool) -> Iterable[str]:
    if not progress:
        return names
    from rich.console import Console
    from rich.progress import track

    return track(names, description="building subspace", console=Console(stderr=True))
