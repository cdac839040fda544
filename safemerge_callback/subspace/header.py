"""What a subspace file says about itself: the JSON under `__metadata__`, and its one writer and reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import SubspaceError

FORMAT = "safemerge.subspace"
VERSION = "1"
# The dtypes that V is computed from and stored in, by safetensors name.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PROBES = "probes"
PROBE_POSITIONS = "probe_positions"


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ModuleHeader:
    """One module's alignment matrix V: `shape` as stored in the checkpoint, `norm` = ‖V‖ (Frobenius).

    `kind` is `dense` (V itself) or `factor` (V = U·W of rank `rank`); `dtype` is that of the stored tensors, as torch
    names it. `null_cosine` is for the stored orientation, d_out = shape[0]; `Subspace.null_cosine` turns it.
    """

    shape: tuple[int, int]
    kind: str
    rank: int | None
    dtype: str
    norm: float
    null_cosine: float

    def tensors(self, name: str) -> dict[str, tuple[int, int]]:
        """Return the tensors of this module in the file, with their shapes."""
        if self.kind == "dense":
            return {f"{name}.V": self.shape}
        rank = self.rank or 0
        return {f"{name}.U": (self.shape[0], rank), f"{name}.W": (rank, self.shape[1])}


@dataclass
class FileHeader:
    """Everything but the tensors. `unmoved` names modules at which both checkpoints are equal: V = 0, not stored.

    `probed` names the rows of the probe tensors.
    """

    aligned: dict[str, Any]
    unaligned: dict[str, Any]
    modules: dict[str, ModuleHeader] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    probed: list[str] = field(default_factory=list)

    def to_metadata(self) -> dict[str, str]:
        """Return the safetensors `__metadata__`, whose values are all strings."""
        return {"format": FORMAT, "version": VERSION, "header": json.dumps(asdict(self), allow_nan=False)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, where: str) -> FileHeader:
        """Read what `to_metadata` wrote. Raises SubspaceError for other files, other versions and broken JSON."""
        metadata = metadata or {}
        if metadata.get("format") != FORMAT:
            found = metadata.get("format", "none")
            raise SubspaceError(
                f"{where} is not a safety-subspace file: format is {found!r}, allowed is {FORMAT!r}. "
                "Write one with build_subspace, or `safemerge build`."
            )
        if metadata.get("version") != VERSION:
            raise SubspaceError(
                f"{where} has format version {metadata.get('version')!r}; this release reads version {VERSION!r}. "
                "Build the subspace again with this release."
            )
        try:
            return cls._from_json(json.loads(metadata["header"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SubspaceError(f"{where} has a corrupt header ({error!r}). Build the subspace again.") from error

    @classmethod
    def _from_json(cls, raw: dict[str, Any]) -> FileHeader:
        modules = {}
        for name, entry in raw["modules"].items():
            rows, columns = entry["shape"]
            modules[name] = ModuleHeader(**{**entry, "shape": (int(rows), int(columns))})
            if modules[name].kind not in ("dense", "factor"):
                raise ValueError(f"kind of {name!r} is {modules[name].kind!r}")
        return cls(dict(raw["aligned"]), dict(raw["unaligned"]), modules, list(raw["unmoved"]), list(raw["probed"]))
