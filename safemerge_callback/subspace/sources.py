"""Where alignment matrices come from: two checkpoints, or one alignment adapter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors, load_adapter
from ..errors import SubspaceError
from ..ops import AlignmentMatrix, Factored, LowRank, squared_norm
from .difference import difference, norm_of, require_finite, storage_dtype
from .header import DTYPES
from .locate import source_name
from .lowrank_detect import find_factors
from .probes import choose_positions, values_at
from .shards import CheckpointShards
from .targets import select_targets


class Material(NamedTuple):
    """One module read: V as the checkpoint stores it, the dtype to write, ‖V‖, and probes of the aligned weight.

    `probe_positions` and `probe_values` are None where no aligned checkpoint is at hand.
    """

    matrix: AlignmentMatrix
    dtype: torch.dtype
    norm: float
    probe_positions: Tensor | None
    probe_values: Tensor | None


class Source(Protocol):
    """What `build_subspace` walks over."""

    names: list[str]
    aligned: dict[str, Any]
    unaligned: dict[str, Any]

    def shape(self, name: str) -> tuple[int, int]:
        """Return the module's shape as stored in the checkpoint."""

    def read(self, name: str, device: torch.device) -> Material:
        """Read one module and compute its alignment matrix on `device`."""


class CheckpointPair:
    """V = aligned - unaligned. Everything that headers can tell is checked before a tensor is read."""

    def __init__(
        self, aligned: str | Path, unaligned: str | Path, target_modules: Sequence[str] | str | None = None
    ) -> None:
        self._aligned = CheckpointShards.open(aligned)
        self._unaligned = CheckpointShards.open(unaligned)
        self.aligned, self.unaligned = self._aligned.fingerprint(), self._unaligned.fingerprint()
        self.names = select_targets({**self._unaligned.names, **self._aligned.names}, target_modules)
        _require_same_modules(self._aligned, self._unaligned, self.names)

    def shape(self, name: str) -> tuple[int, int]:
        """Return the module's shape as stored in the checkpoint."""
        return self._aligned.shape(name)

    def read(self, name: str, device: torch.device) -> Material:
        """Read one module from both checkpoints and subtract; factored where V truly has low rank."""
        weight, other = self._aligned.read(name), self._unaligned.read(name)
        V = difference(weight, other, device)
        norm = norm_of(V)
        if not math.isfinite(norm):
            require_finite(name, weight, self.aligned["source"])
            require_finite(name, other, self.unaligned["source"])
            raise SubspaceError(f"module {name!r}: aligned - unaligned overflows {V.dtype}; are both scaled alike?")
        dtype = storage_dtype(V, weight.dtype, other.dtype)
        factors = find_factors(V, norm) if norm > 0 else None
        positions = choose_positions(weight, V)
        values = values_at(weight, positions)
        if factors is not None and _num_bytes(factors) < V.numel() * min(dtype.itemsize, torch.float32.itemsize):
            return Material(factors, torch.float32, norm, positions, values)
        return Material(V, dtype, norm, positions, values)


class AlignmentAdapter:
    """V = s·B·A of a LoRA adapter that was trained to align the model; `aligned` is only sampled for the probes."""

    def __init__(
        self,
        adapter: str | Path,
        aligned: str | Path | None = None,
        target_modules: Sequence[str] | str | None = None,
    ) -> None:
        loaded = load_adapter(adapter)
        self._factors = loaded.factors
        keys = {name: name for name in loaded.factors}
        self.names = list(keys) if target_modules is None else select_targets(keys, target_modules)
        self._checkpoint = CheckpointShards.open(aligned) if aligned is not None else None
        self.aligned = self._checkpoint.fingerprint() if self._checkpoint else {}
        self.unaligned = _adapter_fingerprint(loaded, adapter)
        if self._checkpoint:
            self._require_checkpoint_shapes(self._checkpoint)

    def shape(self, name: str) -> tuple[int, int]:
        """Return the module's shape as stored in the checkpoint: of an embedding or Conv1D, (d_in, d_out)."""
        factors = self._factors[name]
        return (factors.d_in, factors.d_out) if factors.transposed else (factors.d_out, factors.d_in)

    def read(self, name: str, device: torch.device) -> Material:
        """Return U = s·B and W = A, or their transposes for a module that the checkpoint stores transposed."""
        matrix = _as_stored(self._factors[name], device)
        norm = float(squared_norm(LowRank(matrix.W, matrix.U)).sqrt())
        if self._checkpoint is None:
            return Material(matrix, torch.float32, norm, None, None)
        weight = self._checkpoint.read(name)
        positions = choose_positions(weight, None)
        return Material(matrix, torch.float32, norm, positions, values_at(weight, positions))

    def _require_checkpoint_shapes(self, checkpoint: CheckpointShards) -> None:
        for name in self.names:
            if checkpoint.shape(name) != self.shape(name):
                raise SubspaceError(
                    f"module {name!r} is {self.shape(name)} in the alignment adapter but {checkpoint.shape(name)} in "
                    f"checkpoint {checkpoint.located.name!r}; give the checkpoint that the adapter was trained on."
                )


def _as_stored(factors: LoraFactors, device: torch.device) -> Factored:
    U = (factors.B.to(device, torch.float64) * factors.scaling).float()
    W = factors.A.to(device, torch.float32)
    return Factored(W.mT.contiguous(), U.mT.contiguous()) if factors.transposed else Factored(U, W)


def _num_bytes(factors: Factored) -> int:
    return sum(t.numel() * t.element_size() for t in factors)


def _require_same_modules(aligned: CheckpointShards, unaligned: CheckpointShards, names: Sequence[str]) -> None:
    for one, other in ((aligned, unaligned), (unaligned, aligned)):
        missing = [name for name in names if name not in one.names]
        if missing:
            raise SubspaceError(
                f"{len(missing)} of {len(names)} modules are missing in checkpoint {one.located.name!r} but present in "
                f"{other.located.name!r}, first {missing[0]!r}. Are both of one model? Else narrow target_modules."
            )
    for name in names:
        shapes = aligned.shape(name), unaligned.shape(name)
        if shapes[0] != shapes[1]:
            raise SubspaceError(
                f"module {name!r} is {shapes[0]} in {aligned.located.name!r} but {shapes[1]} in "
                f"{unaligned.located.name!r}; both checkpoints must be of one model. Else narrow target_modules."
            )
        for checkpoint in (aligned, unaligned):
            _require_plain_dtype(checkpoint, name)


def _require_plain_dtype(checkpoint: CheckpointShards, name: str) -> None:
    if checkpoint.dtype(name) not in DTYPES:
        raise SubspaceError(
            f"module {name!r} is stored as {checkpoint.dtype(name)} in checkpoint {checkpoint.located.name!r}, a "
            f"quantised format; allowed are {', '.join(DTYPES)}. Use the unquantised checkpoint."
        )


def _adapter_fingerprint(adapter: Adapter, source: str | Path) -> dict[str, Any]:
    """{alignment_adapter, base_model, sha256}, the hash over names, scalings and factors."""
    digest = hashlib.sha256()
    for name, factors in sorted(adapter.factors.items()):
        digest.update(f"{name} {factors.scaling!r}".encode())
        for tensor in (factors.A, factors.B):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    base = source_name(adapter.base_model) if adapter.base_model else None
    return {"alignment_adapter": source_name(source), "base_model": base, "sha256": digest.hexdigest()}
