"""Write a safetensors file one tensor at a time, and let it appear only when it is whole."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import SubspaceError
from ..io.outputs import free_output
from .blocks import row_blocks
from .digests import TensorDigest, stored_bytes
from .header import SUBSPACE
from .resume import Step, StepLog, sole_writer

_log = logging.getLogger(__name__)

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
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
    spaces, which the format allows. Bytes go to `.<name>.partial` beside `output`, which takes the name `output` in
    `finish`; a file already at `output` stays as it was until then. A second writer of one output is refused, and so is
    an `output` that is one of the `inputs`, or anything else than a subspace file.

    Without `key` an exception removes the partial file. With one, it can be gone on with: `commit` ends a step, and
    the next stream with an equal key (anything that JSON holds) has the finished steps' records in `records` and
    writes behind them. Then only a SubspaceError removes the partial file, and not one raised in `keeping`.
    """

    def __init__(
        self,
        output: str | Path,
        reserve: int,
        *,
        key: Mapping[str, Any] | None = None,
        inputs: Iterable[Any] = (),
    ) -> None:
        self.output = free_output(output, "output", SUBSPACE, inputs, error=SubspaceError)
        self.records: list[dict[str, Any]] = []
        self._partial = self.output.with_name(f".{self.output.name}.partial")
        self._log: StepLog | None = None
        if key is not None:
            self._log = StepLog(self._partial.with_suffix(".partial.steps"), {"reserve": reserve, **key})
        self._reserve = reserve
        self._tensors: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._end = self._committed = 0
        self._keep = False
        self._file: IO[bytes] | None = None
        self._exit = ExitStack()

    def __enter__(self) -> SafetensorsStream:
        try:
            with ExitStack() as opened:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                opened.enter_context(sole_writer(self.output))
                opened.push(self._leave)
                self._open(self._kept_steps())
                self._exit = opened.pop_all()
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def _open(self, steps: list[Step]) -> None:
        self._file = self._partial.open("r+b" if steps else "wb")
        if steps:
            self._file.truncate(8 + self._reserve + self._end)
        self._file.seek(8 + self._reserve + self._end)
        if self._log is not None:
            self._log.restart(steps)

    def _kept_steps(self) -> list[Step]:
        with self.keeping():
            steps = self._log.kept(self._partial, 8 + self._reserve) if self._log is not None else []
        if steps is None:
            _log.warning("%s: an unfinished file of other sources or options is begun anew.", self.output)
        for step in steps or ():
            self._tensors.update(step.tensors)
            self.records.append(step.record)
            self._end = step.end
        if steps:
            _log.info("%s: going on after %d finished steps.", self.output, len(steps))
        self._committed = len(self._tensors)
        return steps or []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._exit.__exit__(kind, error, tb)

    def _leave(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close what is open; remove it, too, unless it is there to be gone on with."""
        for file in (self._file, self._log):
            # Flushing may fail where writing just has.
            with suppress(OSError):
                if file is not None:
                    file.close()
        refused = isinstance(error, SubspaceError) and not self._keep
        if error is not None and not refused and self.records:
            _log.warning("%s: %d finished steps are kept; run the same again to go on.", self.output, len(self.records))
            return
        self._partial.unlink(missing_ok=True)
        if self._log is not None:
            self._log.path.unlink(missing_ok=True)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Do not count a SubspaceError in here as a reason to throw finished steps away: trying again may help."""
        before, self._keep = self._keep, True
        yield
        # Not in a `finally`: after an exception it must hold on until __exit__.
        self._keep = before

    def append(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
        """Write one tensor (any device) in `dtype`, a block of rows at a time; return the digest of its bytes."""
        dtype = dtype or tensor.dtype
        if self._end % _ALIGNMENT:
            gap = torch.zeros(-self._end % _ALIGNMENT, dtype=torch.uint8)
            self._append(f"padding.{self._end}", gap, torch.uint8)
        return self._append(name, tensor, dtype)

    def _append(self, name: str, tensor: Tensor, dtype: torch.dtype) -> str:
        assert self._file is not None, "used outside its `with`"
        start, digest = self._end, TensorDigest()
        try:
            for block in row_blocks(tensor):
                data = stored_bytes(tensor[block], dtype)
                self._file.write(data)
                digest.update(data)
        except OSError as error:
            raise self._unwritable(error) from error
        self._end += tensor.numel() * dtype.itemsize
        self._tensors[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }
        self._digests[name] = digest.hexdigest()
        return self._digests[name]

    def commit(self, record: dict[str, Any]) -> None:
        """End a step: what was appended since the one before, and `record` (JSON-able), outlive a kill."""
        assert self._file is not None, "used outside its `with`"
        assert self._log is not None, "made without a key"
        tensors = dict(list(self._tensors.items())[self._committed :])
        try:
            self._file.flush()
            self._log.add(Step(record, tensors, {name: self._digests[name] for name in tensors}, self._end))
        except OSError as error:
            raise self._unwritable(error) from error
        self._committed = len(self._tensors)
        self.records.append(record)

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
        self._keep = True
        left = f"{len(self.records)} finished steps are kept beside it." if self.records else "Nothing was left there."
        return SubspaceError(f"cannot write {str(self.output)!r}: {error.strerror or error}. {left}")
