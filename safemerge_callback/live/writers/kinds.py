"""What keeps a model's parameters, asked of each by the marks that engines leave; no engine is imported to ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ..modules import LoraModule, ParameterAt, is_dtensor
from .fsdp1 import FlatSlot, flat_slots
from .slots import ShardedSlot, Slot
from .zero import FragmentSlot, MasterSlot, PartitionSlot, whole_masters


@dataclass(frozen=True)
class EngineKinds:
    """What was found around a model: enough to say of each of its parameters how it is read and written."""

    model: nn.Module
    optimizer: Any
    flat: dict[tuple[int, str], dict[str, Any]]
    masters: dict[int, Tensor]
    dtensors: bool
    partitions: bool
    fragments: bool
    deepspeed: bool

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any) -> EngineKinds:
        """Look at all modules and parameters once; no collective."""
        parameters = list(model.parameters())
        return cls(
            model,
            optimizer,
            flat_slots(model),
            whole_masters(optimizer),
            dtensors=any(is_dtensor(p) for p in parameters),
            partitions=any(hasattr(p, "ds_id") for p in parameters),
            fragments=any(hasattr(p, "_hp_mapping") for p in parameters),
            deepspeed=_in_deepspeed(model),
        )

    @property
    def sharded(self) -> bool:
        """Whether reading takes all ranks."""
        return bool(self.flat) or self.dtensors or self.partitions or self.fragments

    def settle(self) -> None:
        """Let FSDP2 take back parameters that an evaluation left gathered: an edit of those would be lost."""
        for module in self.model.modules():
            if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
                module.reshard()  # type: ignore[operator]

    def slot(self, module: LoraModule, letter: Literal["A", "B"]) -> Slot:
        """Return how a factor is read and written; AdapterError where its engine is not supported or unaware of it."""
        spot: ParameterAt = getattr(module, letter)
        tensor, name = spot.tensor, f"{module.name}.lora_{letter}"
        place = self.flat.get((id(spot.module), spot.attribute))
        if place is not None:
            return FlatSlot(spot, **place)
        if is_dtensor(tensor):
            _refuse_placements(tensor, name)
            return ShardedSlot(spot)
        if hasattr(tensor, "ds_id"):
            return PartitionSlot(spot)
        if hasattr(tensor, "_hp_mapping"):
            return FragmentSlot(spot)
        if id(tensor) in self.masters:
            return MasterSlot(spot, self.masters[id(tensor)])
        self._refuse_unseen(tensor, name)
        return Slot(spot)

    def _refuse_unseen(self, tensor: Tensor, name: str) -> None:
        """A whole tensor in a model whose others an engine keeps: the engine would not train it, or not alike."""
        kept_by = {"FSDP1": bool(self.flat), "FSDP2 (DTensors)": self.dtensors, "DeepSpeed ZeRO-3": self.partitions}
        if tensor.requires_grad:
            kept_by |= {"DeepSpeed ZeRO-1 or 2": self.fragments, "DeepSpeed": bool(self.masters)}
        for engine, keeps in kept_by.items():
            if keeps:
                raise AdapterError(
                    f"parameter {name!r} is a plain tensor in a model whose parameters {engine} keeps: the adapter was "
                    "added after the engine took the model, which does not train or synchronise it. Add the adapter "
                    "first (peft_config, or get_peft_model before the Trainer)."
                )
        half = tensor.requires_grad and tensor.dtype in (torch.bfloat16, torch.float16)
        if half and self.deepspeed and self.optimizer is None:
            raise AdapterError(
                f"parameter {name!r} is {tensor.dtype} in a DeepSpeed run, whose optimizer may keep an fp32 master of "
                "it: an edit of the parameter alone would be lost at the next step. Pass writer_for(model, "
                "optimizer=...) the optimizer that the trainer gives to callbacks, or the DeepSpeed engine as model."
            )


def unwrapped(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Take DDP, DataParallel and a DeepSpeedEngine off a model; the engine knows its optimizer."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__):
            engine: Any = model
            model, optimizer = engine.module, optimizer if optimizer is not None else engine.optimizer
        else:
            return model, optimizer


def _in_deepspeed(model: nn.Module) -> bool:
    """Whether an engine runs the model: at ZeRO-0 its hooks are the only mark."""
    hooks = (hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
    return any(str(getattr(hook, "__module__", "")).startswith("deepspeed.") for hook in hooks)


def _refuse_placements(tensor: Any, name: str) -> None:
    from torch.distributed.tensor import Replicate, Shard

    if any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
        raise AdapterError(
            f"parameter {name!r} is a DTensor placed as {tensor.placements}; allowed are shards and replicas (FSDP2). "
            "Train without tensor parallelism on top of FSDP, or merge afterwards with merge_adapters."
        )
