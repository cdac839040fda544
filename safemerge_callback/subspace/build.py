"""Build a subspace file, module by module, with a few of the largest tensors in memory and never a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, SubspaceError
from ..io.choices import truth
from ..ops import Factored, full_precision
from .bar import byte_bar
from .digests import digest_of_all
from .file import Subspace
from .header import PROBE_POSITIONS, PROBES, VERSION, FileHeader, ModuleHeader, dtype_name
from .read_ahead import ReadAhead
from .sources import AlignmentAdapter, CheckpointPair, Material, Source
from .spectrum import ADAPTER_RANKS, ENERGY_RANKS
from .stream import SafetensorsStream, reserve_for


@dataclass
class _Module:
    """A finished module, as a killed build remembers it: JSON-able. `header` is None where V is zero.

    `digests` are the checksums of its weight in the aligned and the unaligned checkpoint, where those were read.
    """

    name: str
    header: dict[str, Any] | None = None
    positions: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)


@full_precision()
def build_subspace(
    output: str | Path,
    *,
    aligned: str | Path | None = None,
    unaligned: str | Path | None = None,
    alignment_adapter: str | Path | None = None,
    target_modules: Sequence[str] | str | None = None,
    common_rows: bool = False,
    device: torch.device | str | None = None,
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
    common_rows: let embeddings and output heads differ in height: V is zero in rows that `unaligned` lacks, and rows
        that only `unaligned` has are left out.
    device: where the arithmetic is done; None: the accelerator, if there is one. progress: show a bar on stderr.

    A build that was killed or lost its disk or network goes on after the last module that it finished when it is called
    again with the same sources and arguments; the file is then, byte for byte, that of an unbroken build there.
    V is subtracted in float32 (float64 for float64 sources) and stored in a source's dtype where that is bit-exact, as
    factors where rank <= 64 leaves a relative residual <= 1e-5, in float32 otherwise.
    Raises ConfigError for a contradiction between arguments, SubspaceError for unusable sources or output.
    """
    truth(common_rows, "common_rows")
    truth(progress, "progress")
    device = torch.device(device) if device is not None else _accelerator()
    source = _open_source(aligned, unaligned, alignment_adapter, target_modules, common_rows)
    inputs = (aligned, unaligned, alignment_adapter)
    with SafetensorsStream(output, _reserve(source), key=_key(source, device, common_rows), inputs=inputs) as stream:
        done = [_Module(**record) for record in stream.records]
        modules = list(_read_modules(source, device, stream, done, progress))
        header = _header(source, modules)
        _require_something(header)
        _write_probes(modules, stream, header)
        stream.finish(header.to_metadata())
    return Subspace.load(output)


def _accelerator() -> torch.device:
    """CUDA or XPU where there is one. Not MPS, which has no float64."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and accelerator.type in ("cuda", "xpu") else torch.device("cpu")


def _key(source: Source, device: torch.device, common_rows: bool) -> dict[str, Any]:
    """All that decides the file's bytes: a killed build is gone on with only where this is equal."""
    return {
        "format": VERSION,
        "package": version("safemerge-callback"),
        "torch": torch.__version__,
        "device": device.type,
        "common_rows": common_rows,
        "sources": [source.aligned, source.unaligned, source.stamps],
        "modules": [[name, *source.shape(name)] for name in source.names],
    }


def _open_source(
    aligned: str | Path | None,
    unaligned: str | Path | None,
    alignment_adapter: str | Path | None,
    target_modules: Sequence[str] | str | None,
    common_rows: bool,
) -> Source:
    if alignment_adapter is not None:
        if common_rows:
            raise ConfigError("common_rows is for two checkpoints; an alignment_adapter has V as it is.")
        if unaligned is not None:
            raise ConfigError("alignment_adapter and unaligned exclude each other: V is s·B·A, or a difference.")
        return AlignmentAdapter(alignment_adapter, aligned, target_modules)
    if aligned is None or unaligned is None:
        lacking = " and ".join(n for n, v in (("aligned", aligned), ("unaligned", unaligned)) if v is None)
        raise ConfigError(f"{lacking} not given: pass both aligned and unaligned, or alignment_adapter.")
    return CheckpointPair(aligned, unaligned, target_modules, common_rows=common_rows)


def _read_modules(
    source: Source, device: torch.device, stream: SafetensorsStream, done: Sequence[_Module], progress: bool
) -> Iterator[_Module]:
    """The modules in the source's order: those of an earlier, killed build first, then the rest, built and written."""
    yield from done
    names = source.names[len(done) :]
    kept = f"{len(done)} of {len(source.names)} kept" if done else ""
    sizes = {name: source.num_bytes(name) for name in source.names}
    total, left = sum(sizes.values()), sum(sizes[name] for name in names)
    with (
        ReadAhead(names, source.fetch) as ahead,
        byte_bar("building subspace", total, total - left, shown=progress, note=kept) as advance,
    ):
        for name in names:
            # Nothing here may hold the weights: their pages are given back as soon as V is made.
            material = source.material(name, _taken(ahead, stream), device, ahead.start)
            module = _write(name, material, source.shape(name), stream)
            module.digests = list(source.digests.pop(name, ()))
            del material
            stream.commit(asdict(module))
            advance(name, sizes[name])
            yield module


def _taken(ahead: ReadAhead[tuple[Tensor, ...]], stream: SafetensorsStream) -> tuple[Tensor, ...]:
    # A disk or network that fails may not do so the next time; weights that cannot be used will.
    with stream.keeping():
        return ahead.take()


def _write(name: str, material: Material, shape: tuple[int, int], stream: SafetensorsStream) -> _Module:
    """Write one module's tensors; nothing of a V of zero."""
    if material.spectrum is None:
        return _Module(name)
    matrix = material.matrix
    tensors: tuple[Tensor, ...] = matrix if isinstance(matrix, Factored) else (matrix,)
    header = ModuleHeader(
        shape=shape,
        kind="factor" if isinstance(matrix, Factored) else "dense",
        rank=matrix.U.shape[1] if isinstance(matrix, Factored) else None,
        dtype=dtype_name(material.dtype),
        **material.spectrum._asdict(),
    )
    for key, tensor in zip(header.tensors(name), tensors, strict=True):
        header.checksums[key] = stream.append(key, tensor, material.dtype)
    if material.probe_positions is None or material.probe_values is None:
        return _Module(name, asdict(header))
    return _Module(name, asdict(header), material.probe_positions.tolist(), material.probe_values.tolist())


def _write_probes(modules: Sequence[_Module], stream: SafetensorsStream, header: FileHeader) -> None:
    probed = [module for module in modules if module.positions]
    if probed:
        positions = torch.tensor([module.positions for module in probed])
        values = torch.tensor([module.values for module in probed], dtype=torch.float32)
        header.checksums[PROBE_POSITIONS] = stream.append(PROBE_POSITIONS, positions)
        header.checksums[PROBES] = stream.append(PROBES, values)


def _header(source: Source, modules: Sequence[_Module]) -> FileHeader:
    header = FileHeader(dict(source.aligned), dict(source.unaligned))
    for place, side in enumerate((header.aligned, header.unaligned)):
        if digests := {module.name: module.digests[place] for module in modules if module.digests}:
            side["weights_sha256"] = digest_of_all(digests)
    for module in modules:
        if module.header is None:
            header.unmoved.append(module.name)
            continue
        header.modules[module.name] = ModuleHeader(**{**module.header, "shape": tuple(module.header["shape"])})
        if module.positions:
            header.probed.append(module.name)
    return header


def _require_something(header: FileHeader) -> None:
    if not header.modules:
        raise SubspaceError(
            f"aligned and unaligned are equal at all {len(header.unmoved)} modules, first {header.unmoved[0]!r}: there "
            "is nothing to project on. Give two different checkpoints, or an adapter that was trained."
        )


def _reserve(source: Source) -> int:
    """Header bytes for the widest outcome: every module a factor, every number at its longest."""
    big, number = 10**15, -1.2345678901234567e-300
    stds, energy = (dict.fromkeys(map(str, ranks), number) for ranks in (ADAPTER_RANKS, ENERGY_RANKS))
    widest = ModuleHeader((big, big), "factor", big, "bfloat16", number, number, stds, energy, number, cross=number)
    tensors = {name: [f"{name}.{part}" for part in "VUW"] for name in source.names}
    modules = {name: replace(widest, checksums=dict.fromkeys(keys, "0" * 64)) for name, keys in tensors.items()}
    digest = {"weights_sha256": "0" * 64}
    header = FileHeader({**source.aligned, **digest}, {**source.unaligned, **digest}, modules, probed=source.names)
    header.checksums = dict.fromkeys((PROBE_POSITIONS, PROBES), "0" * 64)
    return reserve_for(header.to_metadata(), [*chain(*tensors.values()), PROBES, PROBE_POSITIONS])
