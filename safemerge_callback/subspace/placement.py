"""Which placement: a pure function of bytes, and the memory that is free now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError
from ..io.choices import one_of
from .memory import Memory
from .placements import Device, Host
from .stack import FromFile, Placement

PLACEMENTS = ("auto", "device", "host", "disk", "sharded")
# Of a GPU's memory, the share that the training is left with at least: it has not allocated its activations yet.
DEVICE_RESERVE = 3 / 4
# Of the host's memory, the share that everything else is left with at least.
HOST_RESERVE = 1 / 4
# Pinned memory is handed out in powers of two, so a stack may take up to twice its bytes.
PINNED = 2


@dataclass(frozen=True)
class Choice:
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
class Setting:
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


def choose(wanted: str, setting: Setting) -> Choice:
    """Return where alignment matrices stay, as `wanted` or, for `auto`, as memory allows.

    Raises ConfigError for a device or host that has not the room, and for `device` where the factors are on no GPU.
    """
    check_placement(wanted)
    if wanted in ("device", "host"):
        return _as_told(wanted, setting)
    if wanted == "disk":
        return Choice("disk", False, setting.whole, "as set")
    sharded = setting.ranks > 1 and (wanted == "sharded" or _needs_sharding(setting))
    kind, reason = _fitting(setting, setting.share if sharded else setting.whole)
    if wanted == "sharded" and not sharded:
        reason = f"there is one process, with none to share with; {reason}"
    return Choice(kind, sharded, setting.share if sharded else setting.whole, reason)


def _as_told(wanted: str, setting: Setting) -> Choice:
    if setting.gpu is None and wanted == "host":
        return Choice(
            "disk", False, setting.whole, f"host memory is for a GPU, and the factors are on {setting.device}"
        )
    if setting.gpu is None:
        raise ConfigError(
            f"placement is 'device', but the LoRA factors are on {setting.device}: train on a GPU, or set auto or disk"
        )
    memory = setting.gpu if wanted == "device" else setting.host
    needed = setting.whole if wanted == "device" else PINNED * setting.whole
    if needed > memory.free:
        raise ConfigError(
            f"placement is {wanted!r}, which takes {size(needed)}, but {size(memory.free)} are free there: set auto, "
            "disk or sharded, or compress the subspace with `safemerge compress`"
        )
    return Choice(wanted, False, setting.whole, f"as set, {size(memory.free)} are free")


def _needs_sharding(setting: Setting) -> bool:
    """Shards only help where each rank would otherwise stream all of what does not fit on its GPU."""
    return setting.gpu is not None and setting.again and setting.whole > setting.gpu.beyond(DEVICE_RESERVE)


def _fitting(setting: Setting, needed: int) -> tuple[str, str]:
    """The nearest memory that has the room, and why."""
    if setting.gpu is None:
        return "disk", f"the factors are on {setting.device}, where the operating system keeps the file's pages"
    if not setting.again:
        return "disk", "there is one check, at the end, so nothing is read twice"
    on_gpu = setting.gpu.beyond(DEVICE_RESERVE)
    room = f"{size(on_gpu)} of the GPU's {size(setting.gpu.free)} free are beyond the training's reserve"
    if needed <= on_gpu:
        return "device", room
    on_host = setting.host.beyond(HOST_RESERVE)
    room = f"{room}, {size(on_host)} of the host's {size(setting.host.free)}"
    return ("host" if PINNED * needed <= on_host else "disk"), room


def size(count: int) -> str:
    """Return 1.5 GiB for 1610612736."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"
