"""What runs a training, by the marks that engines leave on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .ranks import many
from .writers.kinds import EngineKinds, unwrapped

# What a training may be run by, in words.
ENGINES = ("one process", "DDP", "FSDP", "DeepSpeed")


def engine_of(model: nn.Module, optimizer: Any = None) -> str:
    """Return `one process`, `DDP`, `FSDP` or `DeepSpeed`; DTensors of tensor parallelism count as FSDP's.

    Ask once the engine has taken the model. No collective.
    """
    kinds = EngineKinds.of(*unwrapped(model, optimizer))
    if kinds.deepspeed or kinds.partitions or kinds.fragments:
        return "DeepSpeed"
    if kinds.flat or kinds.dtensors:
        return "FSDP"
    return "DDP" if many() else "one process"
