"""What the processes of a run tell each other; with one process each of these does nothing, or the obvious."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import AdapterError, SafeMergeError

Value = TypeVar("Value")


class ProcessesError(SafeMergeError, RuntimeError):
    """Processes that must hold the same value do not."""


def many() -> bool:
    """Return whether more than one process trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return this process's number, 0 where there is one process."""
    return dist.get_rank() if many() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if many() else 1


def from_first(value: Value) -> Value:
    """Return rank 0's `value` (picklable) on every rank. Collective: every rank must call it."""
    if not many():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean_over_ranks(number: float | Tensor, device: torch.device) -> float:
    """Return its mean over the ranks, the same on all, taken in float64; NaN where any rank's is. Collective.

    One small exchange, and one wait for the device that it comes from.
    """
    wide = torch.as_tensor(number, device=device).detach()
    wide = wide.to(torch.float32 if device.type == "mps" else torch.float64)
    if not many():
        return float(wide)
    wide = wide.to(_wire(device))
    dist.all_reduce(wide)
    return float(wide) / dist.get_world_size()


def everyones(value: Value) -> list[Value]:
    """Return the `value` (picklable) of each rank, by rank. Collective."""
    if not many():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor in place with rank 0's. Collective: same shapes and dtypes, in the same order.

    DDP never compares parameters again after it has started, so what one rank edits a little differently would stay
    so, and grow.
    """
    if not many():
        return
    for tensor in tensors:
        sent = tensor.to(_wire(tensor.device)).contiguous()
        dist.broadcast(sent, src=0)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)


def agree(what: str, value: str) -> None:
    """Raise ProcessesError on every rank, with the values and their ranks, unless all hold one `value`. Collective."""
    values = everyones(value)
    if len(set(values)) == 1:
        return
    ranks_by_value = {v: [rank for rank, other in enumerate(values) if other == v] for v in values}
    listing = "; ".join(f"{v!r} on rank {', '.join(map(str, ranks))}" for v, ranks in ranks_by_value.items())
    raise ProcessesError(
        f"{what} must be the same on all {len(values)} ranks, and is {listing}. Training stops, because the ranks "
        "would drift further apart: resume from the last checkpoint, and give every rank the same settings, files and "
        "seeds."
    )


def all_or_none(action: Callable[[], Value]) -> Value:
    """Return what `action` (which calls no collective itself) gives, once it has succeeded on every rank. Collective.

    Where it raised on any rank, every rank raises that rank's error, so that none waits for one that has left: the
    first failing rank's SafeMergeError with its rank, or an AdapterError naming an error of another kind.
    """
    if not many():
        return action()
    result, error = _tried(action)
    faults = everyones(None if error is None else _portable(error))
    failed = [rank for rank, fault in enumerate(faults) if fault is not None]
    if failed:
        kind, message = faults[failed[0]] or (AdapterError, "")
        raise kind(f"{message} (on rank {', '.join(map(str, failed))} of {len(faults)})") from error
    return result[0]


def _tried(action: Callable[[], Value]) -> tuple[list[Value], Exception | None]:
    try:
        return [action()], None
    except Exception as error:
        return [], error


def _portable(error: Exception) -> tuple[type[SafeMergeError], str]:
    """An error as it can be sent: a class that every rank has, and its words."""
    if isinstance(error, SafeMergeError):
        return type(error), str(error)
    return AdapterError, f"{type(error).__name__}: {error}"


def _wire(device: torch.device) -> torch.device:
    """Where the default group can send from: nccl alone takes nothing from the CPU, where offloaded factors are."""
    served = [pair.partition(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    return device if device.type in served else torch.device(served[0], torch.accelerator.current_device_index())
