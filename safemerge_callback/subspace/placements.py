"""Where alignment matrices stay between checks: on the device or in pinned host memory. On disk is `FromFile`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import AlignmentMatrix, moved
from .stack import Read, Request

# Tensors within packed bytes begin at multiples of this many, as a GPU's own do.
_ALIGNMENT = 256


class Device:
    """Read each stack once and keep it on its device, for as long as this object lives."""

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[str, ...], torch.device, bool], AlignmentMatrix] = {}

    def stacks(self, read: Read, requests: Iterable[Request]) -> Iterator[AlignmentMatrix]:
        """Yield the kept stacks; the same names in another order, or turned, are another stack."""
        for names, device, transposed in requests:
            key = (tuple(names), device, transposed)
            if key not in self._kept:
                self._kept[key] = moved(read(names, transposed), device)
            yield self._kept[key]


class Host:
    """Read each stack once, keep it in pinned host memory, and copy it to its GPU while the one before is used.

    Copies go over a stream of their own, into two buffers a GPU that take turns, so no more than two stacks are there
    at once and the host waits for nothing. Requests for other devices are read from the file
    each time.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[str, ...], bool], Packed] = {}

    def stacks(self, read: Read, requests: Iterable[Request]) -> Iterator[AlignmentMatrix]:
        """Yield each stack, the copy of the next one already on its way."""
        lanes: dict[torch.device, _Lane] = {}
        before: _Sent | None = None
        try:
            for names, device, transposed in requests:
                if device.type == "cuda":
                    if device not in lanes:
                        lanes[device] = _Lane(device)
                    sent = lanes[device].send(self._packed(read, tuple(names), transposed))
                else:
                    sent = _Sent(moved(read(names, transposed), device), None)
                if before is not None:
                    yield before.arrived()
                before = sent
            if before is not None:
                yield before.arrived()
        finally:
            for lane in lanes.values():
                lane.settle()

    def _packed(self, read: Read, names: tuple[str, ...], transposed: bool) -> Packed:
        key = (names, transposed)
        if key not in self._kept:
            self._kept[key] = pack(read(names, transposed), pinned=True)
        return self._kept[key]


class Layout(NamedTuple):
    """One tensor within packed bytes: `start` is its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


class Packed(NamedTuple):
    """An alignment matrix as flat bytes: `storage` is uint8 (n,), `kind` the tuple type it was, None for a tensor."""

    storage: Tensor
    layouts: tuple[Layout, ...]
    kind: type | None

    def matrix(self, storage: Tensor | None = None) -> AlignmentMatrix:
        """Return the matrix as views of its bytes, or of a copy of them, `storage`, which may be longer."""
        whole = self.storage if storage is None else storage
        parts = [_view(whole, layout) for layout in self.layouts]
        return parts[0] if self.kind is None else self.kind(*parts)


def pack(matrix: AlignmentMatrix, pinned: bool = False) -> Packed:
    """Return a copy of `matrix` in one piece of CPU memory, strides as they are, so that it travels in one copy."""
    parts = tuple(matrix) if isinstance(matrix, tuple) else (matrix,)
    layouts, end = [], 0
    for part in parts:
        stride = torch.empty_like(part, device="meta").stride()
        layouts.append(Layout(part.dtype, tuple(part.shape), stride, end))
        end += -(-part.numel() * part.itemsize // _ALIGNMENT) * _ALIGNMENT
    storage = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for part, layout in zip(parts, layouts, strict=True):
        _view(storage, layout).copy_(part)
    return Packed(storage, tuple(layouts), type(matrix) if isinstance(matrix, tuple) else None)


def _view(storage: Tensor, layout: Layout) -> Tensor:
    size = layout.dtype.itemsize * max(1, torch.Size(layout.shape).numel())
    return storage[layout.start : layout.start + size].view(layout.dtype).as_strided(layout.shape, layout.stride)


class _Sent(NamedTuple):
    """A stack on its way, and the event after which it is there."""

    matrix: AlignmentMatrix
    event: torch.cuda.Event | None

    def arrived(self) -> AlignmentMatrix:
        """Let the current stream wait for the copy; the host does not."""
        if self.event is not None:
            device = self.matrix[0].device
            torch.cuda.current_stream(device).wait_event(self.event)
        return self.matrix


class _Lane:
    """A GPU's copy stream and its two buffers, which belong to the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor | None] = [None, None]
        self._turn = 0

    def send(self, packed: Packed) -> _Sent:
        """Start the copy, once what was asked of the GPU so far, the buffer's last use too, is done."""
        buffer = self._buffer(packed.storage.numel())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer[: packed.storage.numel()].copy_(packed.storage, non_blocking=True)
        return _Sent(packed.matrix(buffer), self._stream.record_event())

    def settle(self) -> None:
        """Let the computing stream wait for every copy, since it gives the buffers' memory to others."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _buffer(self, size: int) -> Tensor:
        self._turn = 1 - self._turn
        held = self._buffers[self._turn]
        if held is None or held.numel() < size:
            # The old one goes first, or three would be held.
            self._buffers[self._turn] = held = None
            held = self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return held
