"""DeepSpeed: the fp32 master first, then the low-precision copy; either alone would be lost, or stale until a step.

DeepSpeed is imported only where a parameter bears its marks, or its optimizer was passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..modules import ParameterAt
from .slots import Slot


class MasterSlot(Slot):
    """ZeRO-0 in bf16 or fp16: every rank has the whole master, and only the optimizer knows where."""

    def __init__(self, spot: ParameterAt, master: Tensor) -> None:
        super().__init__(spot)
        self.master = master

    @property
    def wide(self) -> torch.dtype:
        """The master's."""
        return self.master.dtype

    def read(self) -> Tensor:
        """Return the master."""
        return self.master.detach().to(self.device, copy=True)

    def write(self, value: Tensor) -> None:
        """Replace master and copy."""
        self.master.copy_(value)
        self.tensor.copy_(value)

    def holds(self, value: Tensor) -> bool:
        """Ask both."""
        return torch.equal(self.master, value) and torch.equal(self.tensor, value.to(self.narrow))


class FragmentSlot(Slot):
    """ZeRO-1, ZeRO-2 and DeepSpeed's bf16 optimizer: a whole copy, and a master in fragments over the ranks.

    `read` is collective.
    """

    @property
    def wide(self) -> torch.dtype:
        """The master's; DeepSpeed gathers it in float32."""
        return torch.float32

    def read(self) -> Tensor:
        """Gather the master."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(self.tensor).detach()

    def write(self, value: Tensor) -> None:
        """Replace this rank's fragment of the master, and the whole copy."""
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(self.tensor, value)
        self.tensor.copy_(value)

    def holds(self, value: Tensor) -> bool:
        """It cannot tell without the other ranks."""
        return False


class PartitionSlot(FragmentSlot):
    """ZeRO-3: both master and copy are partitioned, and the registered tensor is empty. Both ways are collective."""

    @property
    def shape(self) -> torch.Size:
        """The shape before the partition."""
        return torch.Size(self._parameter.ds_shape)

    @property
    def wide(self) -> torch.dtype:
        """The master's, or the copy's where it is frozen and so has no master."""
        return torch.float32 if self._parameter.requires_grad else self.narrow

    @property
    def _parameter(self) -> Any:
        return self.tensor

    def read(self) -> Tensor:
        """Gather the master."""
        if self._parameter.requires_grad:
            return super().read()
        import deepspeed

        with deepspeed.zero.GatheredParameters([self.tensor]):
            return self.tensor.detach().clone()

    def write(self, value: Tensor) -> None:
        """Replace the partitions of the copy on all ranks, then this rank's of the master."""
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        with deepspeed.zero.GatheredParameters([self.tensor], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                self.tensor.copy_(value)
        if self._parameter.requires_grad:
            safe_set_local_fp32_param(self.tensor, self._rank_part(value))

    def _rank_part(self, value: Tensor) -> Tensor:
        """This rank's part; the last is filled up, which DeepSpeed's setter of whole values does not do."""
        size = self._parameter.ds_tensor.numel()
        start = size * torch.distributed.get_rank(group=self._parameter.ds_process_group)
        part = value.flatten()[start : start + size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))


def wrapped(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizer and those inside it: accelerate's and DeepSpeed's each keep the next as `.optimizer`."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def master_pairs(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (low-precision parameter, whole fp32 master) where the optimizer keeps such, as at ZeRO-0."""
    for layer in wrapped(optimizer):
        copies, flat = getattr(layer, "fp16_groups", None), getattr(layer, "fp32_groups_flat", None)
        masters = getattr(layer, "fp32_groups", None)
        if copies and flat:
            masters = [torch._utils._unflatten_dense_tensors(m, group) for m, group in zip(flat, copies, strict=True)]
        if copies and masters:
            for group, theirs in zip(copies, masters, strict=True):
                yield from zip(group, theirs, strict=True)


def whole_masters(optimizer: Any) -> dict[int, Tensor]:
    """Return id of a low-precision parameter -> its whole fp32 master; empty unless the optimizer keeps such."""
    return {id(parameter): master.detach() for parameter, master in master_pairs(optimizer)}
