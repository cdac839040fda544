"""The control for "does the subspace choose better than chance": V with its spectrum kept and its directions drawn.

Apart from `compare`, which loads it when the file is not there yet: it knows no grid, and needs torch.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from safemerge_callback.ops import Factored, full_precision
from safemerge_callback.subspace import ModuleHeader, Subspace
from safemerge_callback.subspace.header import PROBE_POSITIONS, PROBES, FileHeader
from safemerge_callback.subspace.spectrum import Spectrum, factored_spectrum, sketch_of, spectrum_of
from safemerge_callback.subspace.stream import SafetensorsStream, reserve_for

# Numbers of a header are at most 24 characters; a module has 15 of them, besides checksums that keep their length.
_SLACK = 512


@full_precision()
def random_subspace(source: str | Path | Subspace, output: str | Path, *, seed: int = 0) -> Subspace:
    """Write a subspace of the modules and singular values of `source` with random singular vectors; return it opened.

    Of a module V = U·diag(s)·Wᵀ, U and W are drawn anew, uniformly among orthonormal bases (QR of Gaussians), by `seed`
    and the module's place; s stays, and with it ‖V‖ and the null cosine. Factors stay factors of their rank. The base
    model is recognised as that of `source`. One V is in memory at a time, with an SVD of it where it is dense.
    Raises SubspaceError where `source` is compressed (its spectrum is not V's) or `output` cannot be written.
    """
    opened = (source if isinstance(source, Subspace) else Subspace.load(source)).exact()
    header = FileHeader(
        opened.aligned,
        {"source": f"random singular vectors, seed {seed}", "of": opened.fingerprint},
        unmoved=list(opened.unmoved),
        probed=list(opened.header.probed),
    )
    names = [key for name, module in opened.modules.items() for key in module.tensors(name)]
    reserve = reserve_for(opened.header.to_metadata(), [*names, PROBES, PROBE_POSITIONS])
    with SafetensorsStream(output, reserve + _SLACK * (1 + len(opened.modules))) as stream:
        for place, (name, module) in enumerate(opened.modules.items()):
            generator = torch.Generator().manual_seed(1_000_003 * seed + place)
            header.modules[name] = _write(name, module, opened, stream, generator)
        for key in (PROBE_POSITIONS, PROBES) if header.probed else ():
            header.checksums[key] = stream.append(key, opened.tensors([key])[0])
        stream.finish(header.to_metadata())
    return Subspace.load(output)


def _write(
    name: str, module: ModuleHeader, source: Subspace, stream: SafetensorsStream, generator: torch.Generator
) -> ModuleHeader:
    dtype = torch.float64 if module.dtype == "float64" else torch.float32
    tensors = source.tensors(list(module.tensors(name)))
    values = _singular_values(tensors)
    left, right = (_orthonormal(size, len(values), generator) for size in module.shape)
    drawn: tuple[Tensor, ...] = ((left * values).to(dtype), right.mT.contiguous().to(dtype))
    if module.kind == "dense":
        drawn = (drawn[0] @ drawn[1],)
    header = replace(module, dtype=str(dtype).removeprefix("torch."), **_spectrum(drawn)._asdict(), checksums={})
    for key, tensor in zip(header.tensors(name), drawn, strict=True):
        header.checksums[key] = stream.append(key, tensor, dtype)
    return ModuleHeader(**asdict(header))


def _singular_values(tensors: list[Tensor]) -> Tensor:
    """Those of V, float64, as many as V's shorter side, or as its factors' rank."""
    if len(tensors) == 1:
        return torch.linalg.svdvals(tensors[0].double())
    U, W = (tensor.double() for tensor in tensors)
    return torch.linalg.svdvals(torch.linalg.qr(U).R @ torch.linalg.qr(W.mT).R.mT)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniformly drawn orthonormal columns (rows, columns), float64: Q of a Gaussian, with the signs of R's diagonal."""
    Q, R = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def _spectrum(drawn: tuple[Tensor, ...]) -> Spectrum:
    if len(drawn) == 2:
        V = Factored(*drawn)
        return factored_spectrum(V, float(torch.linalg.matrix_norm(V.U.double())))
    norm = float(torch.linalg.matrix_norm(drawn[0].double()))
    return spectrum_of(drawn[0], norm, sketch_of(drawn[0], norm))
