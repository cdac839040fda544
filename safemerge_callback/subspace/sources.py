"""Where V comes from: two checkpoints, or one alignment adapter; apart from the build, which only walks over it."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors, load_adapter
from ..adapters.beside import left_beside
from ..errors import SubspaceError
from ..io.addresses import source_name
from ..ops import Factored, LowRank, squared_norm, wide_dtype
from .blocks import row_blocks
from .checkpoints.shards import CheckpointShards, num_bytes, stamps_of
from .checkpoints.targets import common_targets, require_same_modules, select_targets
from .digests import digest_of
from .recognise import choose_positions, values_at
from .spectrum import Spectrum, factored_spectrum, find_factors, sketch_of, spectrum_of


class Material(NamedTuple):
    """One module read: V as the checkpoint stores it, the dtype to write, its spectrum, probes of the aligned weight.

    `spectrum` is None where V is zero. The probes are None where no aligned checkpoint is at hand.
    """

    matrix: Tensor | Factored
    dtype: torch.dtype
    spectrum: Spectrum | None
    probe_positions: Tensor | None
    probe_values: Tensor | None


class Source(Protocol):
    """What `build_subspace` walks over: `fetch` may run in another thread, while `material` of the one before does."""

    names: list[str]
    aligned: dict[str, Any]
    unaligned: dict[str, Any]
    stamps: list[str]
    # Module that was fetched -> checksums of its weight in the aligned and the unaligned checkpoint.
    digests: dict[str, tuple[str, str]]

    def shape(self, name: str) -> tuple[int, int]:
        """Return the module's shape as stored in the checkpoint."""

    def num_bytes(self, name: str) -> int:
        """Return how many bytes `fetch` reads."""

    def fetch(self, name: str) -> tuple[Tensor, ...]:
        """Read one module's weights."""

    def material(
        self, name: str, weights: tuple[Tensor, ...], device: torch.device, released: Callable[[], None]
    ) -> Material:
        """Compute one module's alignment matrix on `device` from what `fetch` returned.

        `released` is called when the weights are held no longer, and more is to be computed.
        """


class CheckpointPair:
    """V = aligned - unaligned. Everything that headers can tell is checked before a tensor is read.

    common_rows: take embeddings and output heads of different height too: V has the height of the aligned one, and is
        zero in the rows that the unaligned one lacks.
    """

    def __init__(
        self,
        aligned: str | Path,
        unaligned: str | Path,
        target_modules: Sequence[str] | str | None = None,
        *,
        common_rows: bool = False,
    ) -> None:
        self._aligned = CheckpointShards.open(aligned)
        self._unaligned = CheckpointShards.open(unaligned).named_as(self._aligned)
        self.aligned, self.unaligned = self._aligned.fingerprint(), self._unaligned.fingerprint()
        self.stamps = [*stamps_of(self._aligned), *stamps_of(self._unaligned)]
        self.digests: dict[str, tuple[str, str]] = {}
        self.names = common_targets(self._aligned, self._unaligned, target_modules)
        require_same_modules(self._aligned, self._unaligned, self.names, common_rows=common_rows)

    def shape(self, name: str) -> tuple[int, int]:
        """Return the module's shape as stored in the aligned checkpoint."""
        return self._aligned.shape(name)

    def num_bytes(self, name: str) -> int:
        """Return how many bytes both weights have."""
        return num_bytes(self._aligned, name) + num_bytes(self._unaligned, name)

    def fetch(self, name: str) -> tuple[Tensor, ...]:
        """Read one module from both checkpoints; their checksums are made of the bytes as they come in."""
        weights = self._aligned.read(name), self._unaligned.read(name)
        self.digests[name] = digest_of(weights[0]), digest_of(weights[1])
        return weights

    def material(
        self, name: str, weights: tuple[Tensor, ...], device: torch.device, released: Callable[[], None]
    ) -> Material:
        """Subtract; factored where V truly has low rank."""
        weight, other = weights
        V = difference(weight, other, device)
        norm = norm_of(V)
        if not math.isfinite(norm):
            require_finite(name, weight, self.aligned["source"])
            require_finite(name, other, self.unaligned["source"])
            raise SubspaceError(f"module {name!r}: aligned - unaligned overflows {V.dtype}; are both scaled alike?")
        dtype = storage_dtype(V, weight.dtype, other.dtype)
        positions = choose_positions(weight, V)
        values = values_at(weight, positions)
        # Their pages are given back here, unless the caller holds them.
        del weight, other, weights
        released()
        if norm == 0:
            return Material(V, dtype, None, positions, values)
        sketch = sketch_of(V, norm)
        factors = find_factors(V, norm, sketch)
        if factors is not None and _num_bytes(factors) < V.numel() * min(dtype.itemsize, torch.float32.itemsize):
            return Material(factors, torch.float32, factored_spectrum(factors, norm), positions, values)
        return Material(V, dtype, spectrum_of(V, norm, sketch), positions, values)


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
        self.stamps = stamps_of(self._checkpoint) if self._checkpoint else []
        self.digests: dict[str, tuple[str, str]] = {}
        self._warn_left_out(loaded)
        if self._checkpoint:
            self._require_checkpoint_shapes(self._checkpoint)

    def shape(self, name: str) -> tuple[int, int]:
        """Return the module's shape as stored in the checkpoint: of an embedding or Conv1D, (d_in, d_out)."""
        factors = self._factors[name]
        return (factors.d_in, factors.d_out) if factors.transposed else (factors.d_out, factors.d_in)

    def num_bytes(self, name: str) -> int:
        """Return how many bytes the factors have."""
        return _num_bytes(Factored(self._factors[name].B, self._factors[name].A))

    def fetch(self, name: str) -> tuple[Tensor, ...]:
        """Open the checkpoint's weight, of which a few values are wanted, if there is a checkpoint."""
        return (self._checkpoint.read(name),) if self._checkpoint else ()

    def material(
        self, name: str, weights: tuple[Tensor, ...], device: torch.device, released: Callable[[], None]
    ) -> Material:
        """Return U = s·B and W = A, or their transposes for a module that the checkpoint stores transposed."""
        matrix = _as_stored(self._factors[name], device)
        released()
        norm = float(squared_norm(LowRank(matrix.W, matrix.U)).sqrt())
        spectrum = factored_spectrum(matrix, norm) if norm > 0 else None
        if not weights:
            return Material(matrix, torch.float32, spectrum, None, None)
        positions = choose_positions(weights[0], None)
        return Material(matrix, torch.float32, spectrum, positions, values_at(weights[0], positions))

    def _warn_left_out(self, adapter: Adapter) -> None:
        """Warn of what the adapter was trained to beside its updates, and note it: V does not have it."""
        checkpoint = self._checkpoint
        left = left_beside(
            adapter, lambda name: checkpoint.read(name) if checkpoint and name in checkpoint.names else None
        )
        if left:
            self.unaligned["left_out"] = left
            warnings.warn(
                f"safemerge: left out of alignment adapter {adapter.source!r} are {'; '.join(left)}: the subspace is "
                "that of its LoRA updates. Where the rest matters, merge it into its base, and build from two models",
                stacklevel=5,
            )

    def _require_checkpoint_shapes(self, checkpoint: CheckpointShards) -> None:
        checkpoint.require_plain(self.names)
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


def _adapter_fingerprint(adapter: Adapter, source: str | Path) -> dict[str, Any]:
    """{alignment_adapter, base_model, weights_sha256}, the hash over names, scalings and factors."""
    digest = hashlib.sha256()
    for name, factors in sorted(adapter.factors.items()):
        digest.update(f"{name} {factors.scaling!r}".encode())
        for tensor in (factors.A, factors.B):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    base = source_name(adapter.base_model) if adapter.base_model else None
    return {"alignment_adapter": source_name(source), "base_model": base, "weights_sha256": digest.hexdigest()}


def difference(aligned: Tensor, unaligned: Tensor, device: torch.device) -> Tensor:
    """Return aligned - unaligned on `device`, in float32, or in float64 where either is float64.

    V has the shape of `aligned`; where `unaligned` has fewer rows, V is zero in those that it lacks.
    """
    wide = torch.float64 in (aligned.dtype, unaligned.dtype)
    V = torch.empty(aligned.shape, dtype=torch.float64 if wide else torch.float32, device=device)
    common = min(len(aligned), len(unaligned))
    for rows in row_blocks(V[:common]):
        # Moved first and widened there: half the bytes to move, for narrow weights.
        weight, other = (w[:common][rows].to(device).to(V.dtype) for w in (aligned, unaligned))
        torch.sub(weight, other, out=V[:common][rows])
    V[common:] = 0
    return V


def norm_of(V: Tensor) -> float:
    """Return ‖V‖ (Frobenius), summed in float64; NaN or inf if V is not finite."""
    wide = wide_dtype(V.device)
    norms = [torch.linalg.vector_norm(V[rows], dtype=wide) for rows in row_blocks(V)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def require_finite(name: str, weight: Tensor, source: str) -> None:
    """Raise SubspaceError if `weight` has a NaN or an infinity, naming module and checkpoint."""
    bad = sum(int((~torch.isfinite(weight[rows])).sum()) for rows in row_blocks(weight))
    if bad:
        raise SubspaceError(
            f"checkpoint {source!r}: module {name!r} has {bad} values that are not finite. Use an intact checkpoint."
        )


def storage_dtype(V: Tensor, *sources: torch.dtype) -> torch.dtype:
    """Return the narrowest of `sources` that holds every entry of V bit for bit, else V's own dtype."""
    for dtype in sorted(set(sources), key=lambda d: d.itemsize):
        if dtype.itemsize < V.dtype.itemsize and all(_holds(V[rows], dtype) for rows in row_blocks(V)):
            return dtype
    return V.dtype


def _holds(block: Tensor, dtype: torch.dtype) -> bool:
    return bool((block.to(dtype).to(block.dtype) == block).all())
