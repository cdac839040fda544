"""Where alignment matrices stay between checks: on the device, in pinned host memory or in the file (`FromFile`).

Which of them is a pure function of bytes and the memory that is free now (`choose`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..io.choices import one_of
from ..ops import AlignmentMatrix, moved
from .memory import Memory
from .stack import FromFile, Placement, Read, Request

PLACEMENTS = ("auto", "device", "host", "disk", "sharded")
# Of a GPU's memory, the share that the training is left with at least: it has not allocated its activations yet.
DEVICE_RESERVE = 3 / 4
# Of the host's memory, the share that everything else is left with at least.
HOST_RESERVE = 1 / 4
# Pinned memory is handed out in powers of two, so a stack may take up to twice its bytes.
PINNED = 2
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
        self._kept: dict[tuple[tuple[str, ...], bool], PackedMatrix] = {}

    def stacks(self, read: Read, requests: Iterable[Request]) -> Iterator[AlignmentMatrix]:
        """Yield each stack, the copy of the next one already on its way."""
        lanes: dict[torch.device, _Lane] = {}
        before: _StackCopy | None = None
        try:
            for names, device, transposed in requests:
                if device.type == "cuda":
                    if device not in lanes:
                        lanes[device] = _Lane(device)
                    copy = lanes[device].send(self._packed(read, tuple(names), transposed))
                else:
                    copy = _StackCopy(moved(read(names, transposed), device), None)
                if before is not None:
                    yield before.arrived()
                before = copy
            if before is not None:
                yield before.arrived()
        finally:
            for lane in lanes.values():
                lane.settle()

    def _packed(self, read: Read, names: tuple[str, ...], transposed: bool) -> PackedMatrix:
        key = (names, transposed)
        if key not in self._kept:
            self._kept[key] = pack(read(names, transposed), pinned=True)
        return self._kept[key]


class TensorLayout(NamedTuple):
    """One tensor within packed bytes: `start` is its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


class PackedMatrix(NamedTuple):
    """An alignment matrix as flat bytes: `storage` is uint8 (n,), `kind` the tuple type it was, None for a tensor."""

    storage: Tensor
    layouts: tuple[TensorLayout, ...]
    kind: type | None

    def matrix(self, storage: Tensor | None = None) -> AlignmentMatrix:
        """Return the matrix as views of its bytes, or of a copy of them, `storage`, which may be longer."""
        whole = self.storage if storage is None else storage
        parts = [_view(whole, layout) for layout in self.layouts]
        return parts[0] if self.kind is None else self.kind(*parts)


def pack(matrix: AlignmentMatrix, pinned: bool = False) -> PackedMatrix:
    """Return a copy of `matrix` in one piece of CPU memory, strides as they are, so that it travels in one copy."""
    parts = tuple(matrix) if isinstance(matrix, tuple) else (matrix,)
    layouts, end = [], 0
    for part in parts:
        stride = torch.empty_like(part, device="meta").stride()
        layouts.append(TensorLayout(part.dtype, tuple(part.shape), stride, end))
        end += -(-part.numel() * part.itemsize // _ALIGNMENT) * _ALIGNMENT
    storage = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for part, layout in zip(parts, layouts, strict=True):
        _view(storage, layout).copy_(part)
    return PackedMatrix(storage, tuple(layouts), type(matrix) if isinstance(matrix, tuple) else None)


def _view(storage: Tensor, layout: TensorLayout) -> Tensor:
    size = layout.dtype.itemsize * max(1, torch.Size(layout.shape).numel())
    return storage[layout.start : layout.start + size].view(layout.dtype).as_strided(layout.shape, layout.stride)


class _StackCopy(NamedTuple):
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

    def send(self, packed: PackedMatrix) -> _StackCopy:
        """Start the copy, once what was asked of the GPU so far, the buffer's last use too, is done."""
        buffer = self._buffer(packed.storage.numel())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer[: packed.storage.numel()].copy_(packed.storage, non_blocking=True)
        return _StackCopy(packed.matrix(buffer), self._stream.record_event())

    def settle(self) -> None:
        """Let the computing stream wait for every copy, since it gives the buffers' memory to others."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _buffer(self, size: int) -> Tensor:
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            # The old one goes first, or three would be held.
            self._buffers[self._turn] = buffer = None
            buffer = self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return buffer


@dataclass(frozen=True)
class PlacementChoice:
    """Where alignment matrices stay: `kind` is device, host or disk; `sharded` if each rank has its share of modules.

    `bytes` is what one rank has of them. `reason` says in words why, with the numbers that decided.
    """

    kind: str
    sharded: bool
    bytes: int
    reason: str

    def __str__(self) -> str:
        shared = ", sharded over the ranks" if self.sharded else ""
        return f"{self.kind}{shared}, {size(self.bytes)} a rank: {self.reason}"

    def placement(self) -> Placement:
        """Return a new placement of this kind, to be given to `Subspace.place`."""
        kinds: dict[str, Callable[[], Placement]] = {"device": Device, "host": Host, "disk": FromFile}
        return kinds[self.kind]()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True)
class PlacementInputs:
    """What a choice depends on. Bytes of all alignment matrices (`whole`), and of the largest rank's share.

    `gpu` and `host`: memory that every rank has, the host's divided by the ranks on it; `gpu` None where the factors
    are on no CUDA device, of type `device`. `again`: whether any matrix will be read more than once after the start.
    """

    whole: int
    share: int
    ranks: int
    again: bool
    device: str
    gpu: Memory | None
    host: Memory


def check_placement(placement: str) -> None:
    """Raise ConfigError unless `placement` is one of `PLACEMENTS`."""
    one_of(placement, PLACEMENTS, "placement")


def choose(wanted: str, inputs: PlacementInputs) -> PlacementChoice:
    """Return where alignment matrices stay, as `wanted` or, for `auto`, as memory allows.

    Raises ConfigError for a device or host that has not the room, and for `device` where the factors are on no GPU.
    """
    check_placement(wanted)
    if wanted in ("device", "host"):
        return _as_set(wanted, inputs)
    if wanted == "disk":
        return PlacementChoice("disk", False, inputs.whole, "as set")
    sharded = inputs.ranks > 1 and (wanted == "sharded" or _needs_sharding(inputs))
    kind, reason = _fitting(inputs, inputs.share if sharded else inputs.whole)
    if wanted == "sharded" and not sharded:
        reason = f"there is one process, with none to share with; {reason}"
    return PlacementChoice(kind, sharded, inputs.share if sharded else inputs.whole, reason)


def _as_set(wanted: str, inputs: PlacementInputs) -> PlacementChoice:
    if inputs.gpu is None and wanted == "host":
        return PlacementChoice(
            "disk", False, inputs.whole, f"host memory is for a GPU, and the factors are on {inputs.device}"
        )
    if inputs.gpu is None:
        raise ConfigError(
            f"placement is 'device', but the LoRA factors are on {inputs.device}: train on a GPU, or set auto or disk"
        )
    memory = inputs.gpu if wanted == "device" else inputs.host
    needed = inputs.whole if wanted == "device" else PINNED * inputs.whole
    if needed > memory.free:
        raise ConfigError(
            f"placement is {wanted!r}, which takes {size(needed)}, but {size(memory.free)} are free there: set auto, "
            "disk or sharded, or compress the subspace with `safemerge compress`"
        )
    return PlacementChoice(wanted, False, inputs.whole, f"as set, {size(memory.free)} are free")


def _needs_sharding(inputs: PlacementInputs) -> bool:
    """Shards only help where each rank would otherwise stream all of what does not fit on its GPU."""
    return inputs.gpu is not None and inputs.again and inputs.whole > inputs.gpu.beyond(DEVICE_RESERVE)


def _fitting(inputs: PlacementInputs, needed: int) -> tuple[str, str]:
    """The nearest memory that has the room, and why."""
    if inputs.gpu is None:
        return "disk", f"the factors are on {inputs.device}, where the operating system keeps the file's pages"
    if not inputs.again:
        return "disk", "there is one check, at the end, so nothing is read twice"
    on_gpu = inputs.gpu.beyond(DEVICE_RESERVE)
    room = f"{size(on_gpu)} of the GPU's {size(inputs.gpu.free)} free are beyond the training's reserve"
    if needed <= on_gpu:
        return "device", room
    on_host = inputs.host.beyond(HOST_RESERVE)
    room = f"{room}, {size(on_host)} of the host's {size(inputs.host.free)}"
    return ("host" if PINNED * needed <= on_host else "disk"), room


def size(count: int) -> str:
    """Return 1.5 GiB for 1610612736."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"
