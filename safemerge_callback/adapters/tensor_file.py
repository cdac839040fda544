"""A safetensors file whose shapes are known before its tensors: written in any order, one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterError

# safetensors' names, and its order: the widest first, so that every tensor begins where its dtype may.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """What a tensor in a file will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """A safetensors file at `path`, under way: `put` each tensor of `layout` once, in a `with`.

    No more than the tensor at hand is in memory. Leaving the `with` flushes to the disk; AdapterError for tensors that
    were not put. OSError where the disk refuses. `path` is written directly: give one in a folder that is moved later.
    """

    def __init__(self, path: Path, layout: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._layout = dict(layout)
        self._missing = set(layout)
        self._offsets: dict[str, int] = {}
        self._header = self._place(dict(metadata or {"format": "pt"}))
        self._file: IO[bytes] | None = None

    def _place(self, metadata: dict[str, str]) -> bytes:
        order = sorted(self._layout, key=lambda key: (-self._layout[key].dtype.itemsize, key))
        entries: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for key in order:
            dtype, shape = self._layout[key]
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            entries[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._offsets[key] = start
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        return text + b" " * (-len(text) % 8)

    def __enter__(self) -> TensorFile:
        self._file = self._path.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def put(self, key: str, tensor: Tensor) -> None:
        """Write a tensor of the layout's dtype and shape in its place."""
        assert self._file is not None, "used outside its `with`"
        wanted = self._layout[key]
        if (tensor.dtype, tuple(tensor.shape)) != tuple(wanted):
            raise AdapterError(
                f"tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}; announced was {wanted.dtype} {wanted.shape}"
            )
        self._file.seek(8 + len(self._header) + self._offsets[key])
        data = tensor.detach().cpu().contiguous().reshape(-1)
        if data.numel():
            self._file.write(data.view(torch.uint8).numpy().data)
        self._missing.discard(key)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._file is not None
        with self._file as file:
            file.flush()
            if error is None:
                os.fsync(file.fileno())
        if error is None and self._missing:
            raise AdapterError(
                f"{self._path.name}: {len(self._missing)} tensors were not written: {sorted(self._missing)[:3]}"
            )
