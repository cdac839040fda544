"""The subspace file, opened: its header at once, its tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters import LoraFactors
from ..errors import SubspaceError, nearest
from ..ops import AlignmentMatrix, Factored
from .check import check_base, check_modules
from .header import PROBE_POSITIONS, PROBES, VERSION, FileHeader, ModuleHeader
from .table import render


class Request(NamedTuple):
    """A stack of alignment matrices wanted: modules of one shape and kind, where, and in which orientation."""

    names: tuple[str, ...]
    device: torch.device
    transposed: bool = False


class Subspace:
    """The alignment matrices V of a model, by canonical module name; open it with `Subspace.load`."""

    def __init__(self, path: Path, header: FileHeader) -> None:
        self.path = path
        self._header = header
        self._device: torch.device | None = None
        self._kept: dict[tuple[tuple[str, ...], bool], AlignmentMatrix] = {}

    @classmethod
    def load(cls, path: str | Path) -> Subspace:
        """Open a subspace file; only its header is read.

        Raises SubspaceError for a file that is absent, corrupt, cut short, of another version, or something else.
        """
        path = Path(path).expanduser()
        where = f"subspace {str(path)!r}"
        if not path.is_file():
            raise SubspaceError(f"{where}: no such file. Write one with build_subspace, or `safemerge build`.")
        try:
            with safe_open(path, framework="pt") as file:
                header = FileHeader.from_metadata(file.metadata(), where)
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SubspaceError(
                f"{where} is corrupt, cut short, or no safetensors file ({error}). Build it again."
            ) from error
        _require_tensors(header, shapes, where)
        return cls(path, header)

    @property
    def version(self) -> str:
        """The file's format version."""
        return VERSION

    @property
    def aligned(self) -> dict[str, Any]:
        """Fingerprint of the aligned checkpoint; empty where V came from an adapter alone."""
        return dict(self._header.aligned)

    @property
    def unaligned(self) -> dict[str, Any]:
        """Fingerprint of the unaligned checkpoint, or of the alignment adapter that V came from."""
        return dict(self._header.unaligned)

    @property
    def modules(self) -> Mapping[str, ModuleHeader]:
        """Canonical name -> header of every module that has an alignment matrix."""
        return MappingProxyType(self._header.modules)

    @property
    def unmoved(self) -> tuple[str, ...]:
        """Modules at which aligned and unaligned are equal: V = 0, so they are neither stored nor measured."""
        return tuple(self._header.unmoved)

    def null_cosine(self, name: str, transposed: bool = False) -> float:
        """Return the null cosine, that of an update unrelated to V, for the stored orientation or the transposed one.

        ‖V·Vᵀ‖ = ‖Vᵀ·V‖, so only √d_out in ‖V‖² / (√d_out·‖V·Vᵀ‖) changes: rows become columns.
        """
        module = self._module(name)
        rows, columns = module.shape
        return min(1.0, module.null_cosine * (rows / columns) ** 0.5) if transposed else module.null_cosine

    def stack(
        self, names: Sequence[str], *, device: torch.device | str = "cpu", transposed: bool = False
    ) -> AlignmentMatrix:
        """Return V of modules of one shape and kind, (n, d_out, d_in), or factors (n, d_out, k) and (n, k, d_in).

        The stored dtype, or the widest where it differs between modules; factors of lower rank are filled up with
        zeros. `transposed` turns V from the checkpoint's orientation into the map's (embeddings, Conv1D). One dense
        module is not copied but mapped from the file: do not write to it. Raises SubspaceError for unknown modules and
        for those of different shape or kind.
        """
        key = (tuple(names), transposed)
        if key in self._kept:
            return _moved(self._kept[key], torch.device(device))
        matrix = self._read_stack(names)
        if transposed:
            matrix = Factored(matrix.W.mT, matrix.U.mT) if isinstance(matrix, Factored) else matrix.mT
        if self._device is not None:
            matrix = self._kept[key] = _moved(matrix, self._device)
        return _moved(matrix, torch.device(device))

    def stacks(self, requests: Iterable[Request]) -> Iterator[AlignmentMatrix]:
        """Yield the stack of each request in turn, so that the next may be fetched while one is used."""
        for request in requests:
            yield self.stack(request.names, device=request.device, transposed=request.transposed)

    def keep_on(self, device: torch.device | str) -> None:
        """Keep what `stack` returns on `device` from now on, so that a later call with the same names reads nothing."""
        self._device = torch.device(device)
        self._kept.clear()

    def check(self, factors: Mapping[str, LoraFactors], weights: Mapping[str, Tensor] | None = None) -> None:
        """Raise SubspaceError unless this subspace fits these LoRA modules.

        Refused: modules that are lacking (unmoved ones are not: they are simply not measured, unless all are), shapes
        that differ, and, where live base `weights` are given and probes were recorded, a base model that is not
        `aligned`. A base loaded in bfloat16 or float16 passes.
        """
        check_modules(self._header, factors, f"subspace {str(self.path)!r}")
        if weights and self._header.probed:
            positions, expected = self._read([PROBE_POSITIONS, PROBES])
            check_base(self._header, weights, positions, expected, f"subspace {str(self.path)!r}")

    def describe(self) -> str:
        """Return where V came from and one line a module, as a table."""
        return render(self.path.name, self._header)

    def __repr__(self) -> str:
        return f"Subspace({str(self.path)!r}, {len(self.modules)} modules)"

    def _module(self, name: str) -> ModuleHeader:
        if name in self.modules:
            return self.modules[name]
        if name in self._header.unmoved:
            raise SubspaceError(f"module {name!r} has no alignment matrix: aligned and unaligned are equal there.")
        raise SubspaceError(f"subspace {str(self.path)!r} has no module {name!r}{nearest(name, self.modules)}.")

    def _read(self, keys: Sequence[str]) -> list[Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                return [file.get_tensor(key) for key in keys]
        except (SafetensorError, OSError) as error:
            raise SubspaceError(f"subspace {str(self.path)!r} changed or vanished since it was opened.") from error

    def _read_stack(self, names: Sequence[str]) -> AlignmentMatrix:
        found = {(self._module(name).shape, self._module(name).kind) for name in names}
        if len(found) != 1:
            raise SubspaceError(
                f"stack takes modules of one shape and kind, got {len(found)} of them: {sorted(found)}."
            )
        if found.pop()[1] == "dense":
            return _stacked(self._read([f"{name}.V" for name in names]))
        rank = max(self._module(name).rank or 0 for name in names)
        U, W = self._read([f"{name}.U" for name in names]), self._read([f"{name}.W" for name in names])
        pad = torch.nn.functional.pad
        return Factored(
            _stacked([pad(u, (0, rank - u.shape[1])) for u in U]),
            _stacked([pad(w, (0, 0, 0, rank - w.shape[0])) for w in W]),
        )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0][None]
    dtype = max((t.dtype for t in tensors), key=lambda d: d.itemsize)
    if {t.dtype for t in tensors} == {torch.float16, torch.bfloat16}:
        dtype = torch.float32
    return torch.stack([t.to(dtype) for t in tensors])


def _moved(matrix: AlignmentMatrix, device: torch.device) -> AlignmentMatrix:
    if isinstance(matrix, Factored):
        return Factored(matrix.U.to(device), matrix.W.to(device))
    return matrix.to(device)


def _require_tensors(header: FileHeader, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare what the header announces with the tensors that are there."""
    for name, module in header.modules.items():
        for key, shape in module.tensors(name).items():
            if shapes.get(key) != shape:
                raise SubspaceError(
                    f"{where}: tensor {key!r} should be {shape} but is {shapes.get(key, 'absent')}. Build it again."
                )
    rows = {shapes.get(key, (0,))[0] for key in (PROBES, PROBE_POSITIONS)}
    if rows != {len(header.probed)}:
        raise SubspaceError(f"{where}: probes of {len(header.probed)} modules announced, found {rows}. Build it again.")
