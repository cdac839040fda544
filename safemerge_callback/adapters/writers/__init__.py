"""How a live model's factors are read and replaced; the only place that asks how the model is sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ...ops import LowRank
from ..factors import LoraFactors
from .plain import PlainWriter

__all__ = ["PlainWriter", "Writer", "writer_for"]


class Writer(Protocol):
    """Reads and replaces the LoRA factors of one adapter of a live model."""

    def gather(self) -> dict[str, LoraFactors]:
        """Return canonical name -> full factors, detached."""

    def write(self, new: Mapping[str, LowRank]) -> None:
        """Replace the factors of the modules named, all or none: A (r, d_in) and B (d_out, r) in the live units."""


def writer_for(model: nn.Module, *, adapter_name: str | None = None) -> Writer:
    """Return the writer for a model in one process or under DDP.

    On DDP every rank writes for itself: give each the same values. Raises AdapterError for DeepSpeed's ZeRO and for
    FSDP, where an edit of the visible tensors would be lost or be partial, and as `live_factors` does.
    """
    for name, tensor in _states(model):
        engine = _engine_of(tensor)
        if engine:
            raise AdapterError(
                f"parameter {name!r} is kept by {engine}: measuring and merging on this engine are not supported yet "
                "(gate='watch' is not either). Train with DDP or in one process, or merge afterwards with "
                "merge_adapters on the saved adapter."
            )
    return PlainWriter(_unwrapped(model), adapter_name)


def _states(model: nn.Module) -> Iterator[tuple[str, nn.Module | Tensor]]:
    yield from model.named_modules()
    yield from model.named_parameters()


def _engine_of(state: nn.Module | Tensor) -> str | None:
    """Name what shards or shadows a module or parameter, or return None. Classes by name: no engine is imported."""
    if isinstance(state, nn.Module):
        engines = {"FullyShardedDataParallel": "FSDP1", "DeepSpeedEngine": "DeepSpeed"}
        return next((engines[base.__name__] for base in type(state).__mro__ if base.__name__ in engines), None)
    if hasattr(state, "ds_id"):
        return "DeepSpeed ZeRO-3"
    if hasattr(state, "_hp_mapping"):
        return "DeepSpeed ZeRO-1 or 2"
    return "FSDP2 or tensor parallelism (a DTensor)" if _is_dtensor(state) else None


def _is_dtensor(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _unwrapped(model: nn.Module) -> nn.Module:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return _unwrapped(model.module) if isinstance(model, wrappers) else model
