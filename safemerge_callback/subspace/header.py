"""What a subspace file says about itself: the JSON under `__metadata__`, and its one writer and reader."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import SubspaceError
from ..io.documents import parse_json
from ..io.outputs import FileKind
from .fields import FILE_FIELDS, MODULE_FIELDS, check_fields

FORMAT = "safemerge.subspace"
SUBSPACE = FileKind("a safety subspace", lambda head: FORMAT.encode() in head)
VERSION = "2"
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

    kind: `dense` (V itself), `factor` (V = U·W of rank `rank`), `int8` (V ≈ Q, each row times its scale) or `truncated`
        (V ≈ U·W). dtype: that of the stored tensors, as torch names it.
    null_cosine: for the stored orientation, d_out = shape[0]; `Subspace.null_cosine` turns it. null_std: rank of the
        adapter, as text -> standard deviation of the cosine of an unrelated update, for the stored orientation.
    energy: rank, as text -> share of ‖V‖² that as many leading singular values hold, at least.
    error: ‖V - V_stored‖₂ is at most this; 0.0 where the stored tensors are V.
    checksums: tensor -> digest of its bytes.
    cross: with E = V - V_stored, ‖V_stored·Eᵀ‖₂ and ‖V_storedᵀ·E‖₂ are at most this; 0.0 where `error` is.
    """

    shape: tuple[int, int]
    kind: str
    rank: int | None
    dtype: str
    norm: float
    null_cosine: float
    null_std: dict[str, float] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    checksums: dict[str, str] = field(default_factory=dict)
    cross: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the stored tensors are V."""
        return self.kind in ("dense", "factor")

    def tensors(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return the tensors of this module in the file, with their shapes."""
        if self.kind == "dense":
            return {f"{name}.V": self.shape}
        if self.kind == "int8":
            return {f"{name}.Q": self.shape, f"{name}.scale": self.shape[:1]}
        rank = self.rank or 0
        return {f"{name}.U": (self.shape[0], rank), f"{name}.W": (rank, self.shape[1])}

    def dtype_of(self, key: str) -> str:
        """Return the dtype that the tensor `key` is stored in."""
        return "float32" if key.endswith(".scale") else self.dtype

    def bytes(self, name: str) -> int:
        """Return what the tensors of this module take."""
        shapes = self.tensors(name).items()
        return sum(math.prod(shape) * getattr(torch, self.dtype_of(key)).itemsize for key, shape in shapes)


@dataclass
class FileHeader:
    """Everything but the tensors. `unmoved` names modules at which both checkpoints are equal: V = 0, not stored.

    `probed` names the rows of the probe tensors. `exact`, in a compressed file only: the exact `file` it was made from
    and the `sha256` of that one's header. `checksums`: those of the probe tensors.
    """

    aligned: dict[str, Any]
    unaligned: dict[str, Any]
    modules: dict[str, ModuleHeader] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    probed: list[str] = field(default_factory=list)
    exact: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Return the safetensors `__metadata__`, whose values are all strings."""
        header = json.dumps(asdict(self), allow_nan=False)
        return {"format": FORMAT, "version": VERSION, "header": header, "sha256": _sha256(header)}

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
            if metadata["sha256"] != _sha256(metadata["header"]):
                raise ValueError("it is not the one whose sha256 is given")
            return cls._from_json(parse_json(metadata["header"], "the header"))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SubspaceError(f"{where} has a corrupt header ({error!r}). Build the subspace again.") from error

    @classmethod
    def _from_json(cls, raw: dict[str, Any]) -> FileHeader:
        check_fields(raw, FILE_FIELDS, "the file")
        modules = {}
        for name, entry in raw["modules"].items():
            check_fields(entry, MODULE_FIELDS, f"module {name!r}")
            modules[name] = ModuleHeader(**{**entry, "shape": tuple(entry["shape"])})
        if strangers := set(raw["probed"]) - modules.keys():
            raise ValueError(f"probed names {sorted(strangers)[0]!r}, which is no module of it")
        names = ("aligned", "unaligned", "unmoved", "probed", "exact", "checksums")
        header = cls(**{name: raw[name] for name in names}, modules=modules)
        for side in (header.aligned, header.unaligned):
            _rename_digest(side)
        return header


def _rename_digest(side: dict[str, Any]) -> None:
    """Older files call both digests `sha256`: that of a checkpoint's headers, and that of an adapter."""
    if "sha256" in side:
        side["weights_sha256" if "alignment_adapter" in side else "header_sha256"] = side.pop("sha256")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
