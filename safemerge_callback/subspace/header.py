"""What a subspace file says about itself: the JSON under `__metadata__`, its fields, its one writer and reader."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import SubspaceError, shown
from ..io.documents import parse_json
from ..io.numbers import is_number, is_whole
from ..io.outputs import FileKind

FORMAT = "safemerge.subspace"
SUBSPACE = FileKind("a safety subspace", lambda head: FORMAT.encode() in head)
VERSION = "2"
# The dtypes that V is computed from and stored in, by safetensors name.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PROBES = "probes"
PROBE_POSITIONS = "probe_positions"
_KINDS = ("dense", "factor", "int8", "truncated")
_STORED_DTYPES = ("float64", "float32", "float16", "bfloat16", "int8")
# Shares and cosines are computed: a last bit may lie above 1.
_ROUNDING = 1e-3


class FieldRule(NamedTuple):
    """Which values are allowed: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _each(rule: FieldRule, keys: str = "names", key_holds: Callable[[str], bool] = bool) -> FieldRule:
    """A mapping from `keys`, texts that `key_holds` says are allowed, to what `rule` allows."""
    return FieldRule(
        f"a mapping from {keys} to {rule.words}",
        lambda value: isinstance(value, dict) and all(key_holds(k) and rule.holds(v) for k, v in value.items()),
    )


def _is_rank(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


_TEXT = FieldRule("texts", lambda value: isinstance(value, str))
_MAPPING = FieldRule("mappings", lambda value: isinstance(value, dict))
_SIZE = FieldRule("numbers of 0 or more", lambda value: is_number(value) and value >= 0)
_SHARE = FieldRule("numbers from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1 + _ROUNDING)
_NAMES = FieldRule("lists of names", lambda value: isinstance(value, list) and all(map(_TEXT.holds, value)))

MODULE_FIELDS: Mapping[str, FieldRule] = {
    "shape": FieldRule(
        "two whole numbers of 1 or more",
        lambda value: isinstance(value, list) and len(value) == 2 and all(is_whole(size, 1) for size in value),
    ),
    "kind": FieldRule(f"one of {_KINDS}", lambda value: isinstance(value, str) and value in _KINDS),
    "rank": FieldRule("null or whole numbers of 1 or more", lambda value: value is None or is_whole(value, 1)),
    "dtype": FieldRule(f"one of {_STORED_DTYPES}", lambda value: isinstance(value, str) and value in _STORED_DTYPES),
    "norm": FieldRule("numbers above 0", lambda value: is_number(value) and value > 0),
    "null_cosine": _SHARE,
    "null_std": _each(_SIZE, "ranks", _is_rank),
    "energy": _each(_SHARE, "ranks", _is_rank),
    "error": _SIZE,
    "checksums": _each(_TEXT),
    "cross": _SIZE,
}
FILE_FIELDS: Mapping[str, FieldRule] = {
    "aligned": _MAPPING,
    "unaligned": _MAPPING,
    "modules": _each(_MAPPING),
    "unmoved": _NAMES,
    "probed": _NAMES,
    "exact": FieldRule(
        "an empty mapping or one with `file` and `sha256`",
        lambda value: _each(_TEXT).holds(value) and (not value or {"file", "sha256"} <= value.keys()),
    ),
    "checksums": _each(_TEXT),
}


def check_fields(values: Any, rules: Mapping[str, FieldRule], who: str) -> None:
    """Raise ValueError for a field of `values` whose rule does not hold; `who` says whose fields they are.

    A field that is not there is for the reader to miss.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{who} is {shown(values)}, not a mapping")
    for name, rule in rules.items():
        if name in values and not rule.holds(values[name]):
            raise ValueError(f"{name} of {who} is {shown(values[name])}; allowed are {rule.words}")


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
            format_name = metadata.get("format", "none")
            raise SubspaceError(
                f"{where} is not a safety-subspace file: format is {format_name!r}, allowed is {FORMAT!r}. "
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
