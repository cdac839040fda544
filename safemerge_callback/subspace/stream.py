"""Write a safetensors file one tensor at a time, and let it appear only when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import SubspaceError
from .blocks import row_blocks

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
# Readers view the bytes as the tensor's dtype, which needs an offset that the widest dtype divides.
_ALIGNMENT = 8
# A number no offset or size reaches: the widest text that a header entry can hold.
_WIDEST = 10**15


def reserve_for(metadata: Mapping[str, str], tensor_names: Iterable[str]) -> int:
    """Return header bytes that suffice for these tensors and metadata no longer than this one."""
    entry = {"dtype": "BF16", "shape": [_WIDEST, _WIDEST], "data_offsets": [_WIDEST, _WIDEST]}
    worst = dict.fromkeys(tensor_names, entry)
    padding = {f"padding.{_WIDEST + i}": entry for i in range(len(worst))}
    size = len(_render(metadata, {**worst, **padding}))
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _render(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": dict(metadata), **tensors}, separators=(",", ":")).encode()


class SafetensorsStream:
    """A safetensors file under way: `append` tensors, then `finish` with the metadata; use it in a `with`.

    The header comes first in the format but is known last, so `reserve` bytes are left for it and filled up with
    spaces, which the format allows. Bytes go to a file beside `output`, which takes the name `output` in `finish`; on
    an exception it is removed, and a file already at `output` stays as it was.
    """

    def __init__(self, output: str | Path, reserve: int) -> None:
        self.output = Path(output).expanduser()
        self._partial = self.output.with_name(f".{self.output.name}.{os.getpid()}.partial")
        self._reserve = reserve
        self._tensors: dict[str, Any] = {}
        self._end = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> SafetensorsStream:
        if self.output.is_dir():
            raise SubspaceError(f"output {str(self.output)!r} is a folder; give the path of a file.")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")
            self._file.seek(8 + self._reserve)
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def append(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write one tensor (any device) in `dtype`, a block of rows at a time."""
        dtype = dtype or tensor.dtype
        if self._end % _ALIGNMENT:
            gap = torch.zeros(-self._end % _ALIGNMENT, dtype=torch.uint8)
            self._append(f"padding.{self._end}", gap, torch.uint8)
        self._append(name, tensor, dtype)

    def _append(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        assert self._file is not None, "used outside its `with`"
        start = self._end
        try:
            for block in row_blocks(tensor):
                self._file.write(_little_endian_bytes(tensor[block].to("cpu", dtype)))
        except OSError as error:
            raise self._unwritable(error) from error
        self._end += tensor.numel() * dtype.itemsize
        self._tensors[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, flush to the disk, and put the file in its place."""
        assert self._file is not None, "used outside its `with`"
        header = _render(metadata, self._tensors)
        if len(header) > self._reserve:
            raise SubspaceError(f"header of {len(header)} bytes is longer than the {self._reserve} reserved for it.")
        try:
            self._file.seek(0)
            self._file.write(self._reserve.to_bytes(8, "little") + header.ljust(self._reserve))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.output)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> SubspaceError:
        return SubspaceError(f"cannot write {str(self.output)!r}: {error.strerror or error}. Nothing was left there.")


def _little_endian_bytes(block: Tensor) -> memoryview:
    return block.contiguous().reshape(-1).view(torch.uint8).numpy().data
