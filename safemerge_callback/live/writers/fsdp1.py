"""FSDP1: factors are slices of a flat parameter, whole only while their unit is summoned."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import ParameterAt
from .slots import Slot


class FlatSlot(Slot):
    """A parameter inside a flat one. Opening its unit is collective, and makes the whole unit whole for a moment."""

    def __init__(
        self, spot: ParameterAt, unit: nn.Module, root: nn.Module, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        super().__init__(spot)
        self._module, self._root, self._shape, self._dtype = unit, root, shape, dtype

    @property
    def unit(self) -> Hashable:  # type: ignore[override]
        """The FSDP unit that it is part of."""
        return id(self._module)

    @property
    def shape(self) -> torch.Size:
        """The shape before it was flattened."""
        return self._shape

    @property
    def narrow(self) -> torch.dtype:
        """The flat parameter's own, which the optimizer steps from."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the unit computes; the flat slices may be offloaded."""
        return self._module.compute_device  # type: ignore[return-value]

    @contextmanager
    def opened(self, *, write: bool) -> Iterator[None]:
        """Summon the unit."""
        with summoned(self._root, self._module, write=write):
            yield

    def read(self) -> Tensor:
        """Copy what is whole only now."""
        return self.tensor.detach().clone()

    def holds(self, value: Tensor) -> bool:
        """It cannot tell when the unit is closed."""
        return False


def summoned(root: nn.Module, unit: nn.Module, *, write: bool) -> AbstractContextManager[None]:
    """Make one unit whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if getattr(root, "_is_root", True) is None:
        # Before the first forward pass, the unit that is summoned first would take itself for the root.
        with FullyShardedDataParallel.summon_full_params(root, recurse=False, writeback=False):
            pass
    return FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=write)


def flat_slots(model: nn.Module) -> dict[tuple[int, str], dict[str, Any]]:
    """Return (id of module, attribute) -> what `FlatSlot` needs beside the spot, for all parameters FSDP1 holds."""
    units = [module for module in model.modules() if is_fsdp1(module)]
    places: dict[tuple[int, str], dict[str, Any]] = {}
    for unit in units:
        flat = getattr(getattr(unit, "_handle", None), "flat_param", None)
        if flat is None:
            continue
        for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
            place = {"unit": unit, "root": units[0], "shape": torch.Size(shape), "dtype": flat.dtype}
            places[id(info.module), info.param_name] = place
    return places


def is_fsdp1(module: nn.Module) -> bool:
    """Return whether the module is an FSDP1 unit; by name, since importing FSDP1 takes a while."""
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)
