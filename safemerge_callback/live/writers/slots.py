"""How one parameter is read and replaced whole: the part that every kind of parameter shares, and the plain kind."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..modules import ParameterAt


class Slot:
    """A parameter that is whole on this rank: one process, DDP, ZeRO-0 without masters. Others are its children.

    `wide` is the dtype of its truth, in which it is read; `narrow` the lowest that a new value is cast to. `read` and
    `write` are collective where a child says so, and are called within `opened()`, one for all slots of equal `unit`.
    """

    unit: Hashable = None

    def __init__(self, spot: ParameterAt) -> None:
        self.spot = spot

    @property
    def tensor(self) -> Tensor:
        """What the model has registered."""
        return self.spot.tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole."""
        return self.tensor.shape

    @property
    def narrow(self) -> torch.dtype:
        """The dtype that the forward pass sees."""
        return self.tensor.dtype

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the value that the optimizer steps from."""
        return self.narrow

    @property
    def device(self) -> torch.device:
        """Where the whole is read to, and written from."""
        return self.tensor.device

    def opened(self, *, write: bool) -> AbstractContextManager[None]:
        """Make the whole visible while inside; with `write`, keep on leaving what was written."""
        return nullcontext()

    def read(self) -> Tensor:
        """Return the whole, detached: the live tensor itself, or a copy of what was gathered."""
        return self.tensor.detach()

    def write(self, value: Tensor) -> None:
        """Replace the whole, in every copy there is."""
        self.tensor.copy_(value)

    def holds(self, value: Tensor) -> bool:
        """Return whether it surely holds `value`, asked after a write that failed; no collective."""
        return torch.equal(self.tensor, value)


class ShardedSlot(Slot):
    """A DTensor that torch shards or replicates over a mesh (FSDP2). `read` is collective, `write` is not."""

    @property
    def device(self) -> torch.device:
        """That of the mesh: with offloading the shards are on the host, where their backend may not gather them."""
        return torch.device(self._dtensor.device_mesh.device_type, self._dtensor.to_local().device.index)

    @property
    def _dtensor(self) -> Any:
        return self.tensor

    def read(self) -> Tensor:
        """Gather the shards."""
        return self._dtensor.detach().to(self._dtensor.device_mesh.device_type).full_tensor()

    def write(self, value: Tensor) -> None:
        """Cut out this rank's shard and replace it."""
        from torch.distributed.tensor import distribute_tensor

        # No source rank: all hold the same value already, and would get it a second time.
        shard = distribute_tensor(value, self._dtensor.device_mesh, self._dtensor.placements, src_data_rank=None)
        self._dtensor.to_local().copy_(shard.to_local())

    def holds(self, value: Tensor) -> bool:
        """It cannot tell without the other ranks."""
        return False
