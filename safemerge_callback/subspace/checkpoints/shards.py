"""One checkpoint, one tensor at a time: no more of a model in memory than is being read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import SubspaceError, nearest
from ..header import DTYPES
from .layouts import StoredTensor, Weight, WeightPiece, alias_tied_head, named_as, weights_of
from .locate import Located, locate
from .quantised import by_dtype, format_of, quantised, quantised_modules
from .spellings import spelling_of


@dataclass(frozen=True, eq=False)
class CheckpointShards:
    """The 2-D weights (linear layers, embeddings, single experts) of a safetensors checkpoint, read one by one.

    Make it with `CheckpointShards.open`; then only headers have been read. Names are canonical. `quantised` maps the
    modules whose weight is packed to the format, such as `gptq`: those cannot be read.
    """

    located: Located
    _weights: Mapping[str, Weight]
    quantised: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> CheckpointShards:
        """Open a folder (single file or sharded), a `.safetensors` file, or a Hub id, `org/name[@revision]`.

        A Hub id is read from the Hub's cache where all of it is there, else over the network, the wanted tensors only.
        Where `lm_head` is absent it is the input embedding (tied weights). Stacked experts (one 3-D tensor) are one
        module an expert. Raises SubspaceError for a checkpoint that is corrupt, incomplete, out of reach, or not in
        safetensors, and where two keys have one canonical name.
        """
        located = locate(source, revision)
        tensors = _tensors_of(located)
        try:
            weights = weights_of(tensors, spelling_of(located.architecture))
        except SubspaceError as error:
            raise SubspaceError(f"checkpoint {located.name!r}: {error}") from error
        packed = quantised_modules(
            {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}, located.config
        )
        if not weights:
            if how := next(iter(packed.values()), format_of(located.config)):
                raise quantised(f"checkpoint {located.name!r}", how, [*packed], len(packed))
            raise SubspaceError(f"checkpoint {str(source)!r} has no 2-D `.weight` tensor: give a language model's.")
        alias_tied_head(weights)
        return cls(located, weights, packed)

    def named_as(self, other: CheckpointShards) -> CheckpointShards:
        """Return this checkpoint under the names of `other`, another checkpoint of the same model.

        Where one has fused layers (`qkv_proj`, `gate_up_proj`) that the other has apart, the answers are views of the
        fused tensor, or the parts put together, one module at a time.
        """
        shapes = {name: other.shape(name) for name in other.names}
        return CheckpointShards(self.located, named_as(self._weights, shapes), self.quantised)

    @property
    def names(self) -> dict[str, str]:
        """Canonical module name -> key in the checkpoint, of the first part where the module is made of several."""
        return {name: weight.key for name, weight in self._weights.items()}

    def shape(self, name: str) -> tuple[int, int]:
        """Return the weight's shape as stored, from the header."""
        return self._weight(name).shape

    def dtype(self, name: str) -> str:
        """Return the weight's safetensors dtype, such as `BF16`, from the header."""
        return self._weight(name).dtype

    def read(self, name: str) -> Tensor:
        """Return one weight on the CPU in its stored dtype and orientation; do not write to it (it may be a map).

        A view of a larger tensor where only a part of one is the module; a copy where it is made of several.
        """
        self.require_plain([name])
        weight = self._weight(name)
        parts = [_read(piece) for piece in weight.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def require_plain(self, names: Sequence[str]) -> None:
        """Raise SubspaceError where any of these modules is quantised."""
        packed = {name: how for name in names if (how := self._format(name))}
        if packed:
            raise quantised(f"checkpoint {self.located.name!r}", next(iter(packed.values())), [*packed], len(names))

    def fingerprint(self) -> dict[str, Any]:
        """Return {source, revision, files, sizes, header_sha256}; no machine path is in it.

        The hash is of all headers, in order: it sees names, shapes and layout, which models of one architecture share.
        """
        digest = hashlib.sha256()
        for file in self.located.files:
            digest.update(file.header())
        return {
            "source": self.located.name,
            "revision": self.located.revision,
            "files": [file.name for file in self.located.files],
            "sizes": [file.size() for file in self.located.files],
            "header_sha256": digest.hexdigest(),
        }

    def _format(self, name: str) -> str | None:
        """How a module is quantised; None where it is not."""
        weight = self._weights.get(name)
        if weight is None or weight.dtype in DTYPES:
            return self.quantised.get(name)
        return self.quantised.get(name) or by_dtype(weight.dtype)

    def _weight(self, name: str) -> Weight:
        if name not in self._weights:
            raise SubspaceError(
                f"checkpoint {self.located.name!r} has no module {name!r}{nearest(name, self._weights)}"
            )
        return self._weights[name]


def _read(piece: WeightPiece) -> Tensor:
    rows, columns = piece.shape
    return piece.file.read(piece.key, piece.start, rows * columns).view(rows, columns)


def _tensors_of(located: Located) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by key; SubspaceError where the files do not hold what the index lists."""
    tensors: dict[str, StoredTensor] = {}
    for file in located.files:
        for key, (shape, dtype) in file.tensors().items():
            if key in tensors:
                raise SubspaceError(
                    f"checkpoint {located.name!r}: {key!r} is both in {tensors[key].file.name!r} and {file.name!r}."
                )
            tensors[key] = StoredTensor(file, shape, dtype)
    lacking = [key for key, name in located.listed.items() if key not in tensors or tensors[key].file.name != name]
    if lacking:
        raise SubspaceError(
            f"checkpoint {located.name!r}: {len(lacking)} of {len(located.listed)} tensors that the index lists are "
            f"not in the file that it names, first {lacking[0]!r} in {located.listed[lacking[0]]!r}. Download the "
            "checkpoint again."
        )
    return tensors


def num_bytes(checkpoint: CheckpointShards, name: str) -> int:
    """Return how many bytes one weight has in its checkpoint."""
    rows, columns = checkpoint.shape(name)
    return rows * columns * DTYPES[checkpoint.dtype(name)].itemsize


def stamps_of(checkpoint: CheckpointShards) -> list[str]:
    """Return name and time of change of the checkpoint's files on this machine, which the fingerprint leaves out."""
    paths = [getattr(file, "path", None) for file in checkpoint.located.files]
    return [f"{path.name} {path.stat().st_mtime_ns}" for path in paths if isinstance(path, Path)]
