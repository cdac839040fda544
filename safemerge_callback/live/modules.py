"""Where the LoRA factors of a live PEFT model are, under canonical names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.factors import LoraFactors
from ..adapters.names import canonical_name
from ..adapters.refusals import moves_base, refuse_config, refuse_tuner, refuse_variant
from ..errors import AdapterError, nearest

# Whose parameters PEFT leaves out of a pass while adapters are off: factors, copies of modules, rows of tokens.
_ADAPTERS = re.compile(r"(^|\.)(lora_|modules_to_save\.|trainable_tokens_)")


class ParameterAt(NamedTuple):
    """Where a factor is registered: `module.<attribute>` is the Parameter, or what an engine has put in its place."""

    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """What is registered now: whole, a part of it, or a DTensor."""
        return getattr(self.module, self.attribute)


class LoraModule(NamedTuple):
    """One LoRA module of a live model: where its factors are, and the rest of its `LoraFactors`."""

    name: str
    A: ParameterAt
    B: ParameterAt
    scaling: float
    transposed: bool

    def factors(self, A: Tensor, B: Tensor) -> LoraFactors:
        """Return them with these whole tensors; AdapterError unless they are (r, d_in) and (d_out, r), in memory."""
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
            raise AdapterError(
                f"module {self.name!r}: lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, not (r, d_in) and "
                "(d_out, r). ZeRO-3 and FSDP1 keep only a part of each on a rank: use writer_for(model).gather()."
            )
        if A.device.type == "meta" or B.device.type == "meta":
            raise AdapterError(
                f"module {self.name!r}: the factors are offloaded (meta device). Keep the adapter in memory."
            )
        return LoraFactors(self.name, A, B, self.scaling, self.transposed)


def live_factors(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoraFactors]:
    """Return canonical name -> factors, whose A and B are the live Parameters, of one adapter of a PEFT model.

    Linear, Conv1D and Embedding modules, plain or quantised underneath. Without `adapter_name`: the one active
    adapter, so that a frozen reference adapter beside it is left alone. Raises AdapterError when there is no LoRA,
    when several adapters are active, when factors are tied, for everything that `refusals` names, and where an engine
    keeps only a part of each factor on a rank: `writer_for(model).gather()` reads those.
    """
    factors = {}
    for name, module in lora_modules(model, adapter_name).items():
        A, B = module.A.tensor, module.B.tensor
        if is_dtensor(A) or is_dtensor(B):
            raise AdapterError(
                f"module {name!r}: the factors are shared out over ranks (DTensors). Use writer_for(model).gather(), "
                "which gives them whole on every rank."
            )
        factors[name] = module.factors(A, B)
    return factors


def lora_modules(
    model: nn.Module, adapter_name: str | None = None, *, moved_base: bool = False
) -> dict[str, LoraModule]:
    """Return canonical name -> where each LoRA module's factors are, whole or not; raises as `live_factors` does.

    `moved_base` accepts factors that began as a part of the base weight: see `LoraFactors.initial`.
    """
    layers = dict(_lora_layers(model))
    adapter = _chosen(layers, adapter_name)
    configs = _peft_configs(model)
    if adapter in configs:
        refuse_config(vars(configs[adapter]), f"adapter {adapter!r}", moved_base=moved_base)
    modules: dict[str, LoraModule] = {}
    for path, layer in layers.items():
        if adapter not in _names_of(layer):
            continue
        module = _module_of(path, layer, adapter)
        if module.name in modules:
            raise AdapterError(f"two LoRA modules share the name {module.name!r}, the second is at {path!r}.")
        modules[module.name] = module
    _refuse_tied(modules)
    return modules


def lora_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return an adapter's name, and canonical name -> PEFT's layer of each of its modules; raises as `live_factors`."""
    layers = dict(_lora_layers(model))
    adapter = _chosen(layers, adapter_name)
    return adapter, {canonical_name(path): layer for path, layer in layers.items() if adapter in _names_of(layer)}


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether this is a DTensor: torch's own sharding, as of FSDP2 and tensor parallelism."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def base_moved(model: nn.Module, adapter_name: str | None = None) -> bool:
    """Return whether the adapter's initialisation moved a part of the base weight into its factors."""
    config = _peft_configs(model).get(active_adapter(model, adapter_name))
    return config is not None and moves_base(vars(config))


def active_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """Return the name of the adapter that `live_factors` would take; raises AdapterError as it does."""
    return _chosen(dict(_lora_layers(model)), adapter_name)


def is_adapters(name: str) -> bool:
    """Return whether a parameter of this name is an adapter's, and so without effect while that is off."""
    return _ADAPTERS.search(name) is not None


def trained_base(model: nn.Module) -> list[str]:
    """Return the names of the parameters of a PEFT model that are trained and have effect with the adapter off."""
    return [name for name, p in model.named_parameters() if p.requires_grad and not is_adapters(name)]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return canonical name -> frozen base weight of each LoRA module, as the checkpoint stores it, not copied.

    Only plain floating 2-D tensors: weights that are quantised, sharded or on the meta device are left out.
    """
    weights = {canonical_name(path): _base_weight(layer) for path, layer in _lora_layers(model)}
    return {name: weight for name, weight in weights.items() if weight is not None}


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and layer of each LoRA module; raises AdapterError on another tuner's layers."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        # Trained token rows are a delta of their own beside the LoRA modules, not an adapter on them.
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            refuse_tuner(module, path)
            yield path, module


def _names_of(layer: Any) -> set[str]:
    return set(layer.lora_A) | set(layer.lora_embedding_A)


def _chosen(layers: dict[str, Any], adapter_name: str | None) -> str:
    present = {name for layer in layers.values() for name in _names_of(layer)}
    if not present:
        raise AdapterError("the model has no LoRA module. Wrap it with peft.get_peft_model, or pass peft_config.")
    if adapter_name is not None:
        if adapter_name not in present:
            raise AdapterError(
                f"the model has no LoRA adapter {adapter_name!r}; choose one of {sorted(present)}"
                f"{nearest(adapter_name, present)}"
            )
        return adapter_name
    active = {name for layer in layers.values() for name in layer.active_adapters} & present
    if len(active) != 1:
        raise AdapterError(
            f"{len(active)} LoRA adapters are active ({sorted(active)}) of {sorted(present)}; one is needed, because "
            "the update that counts is that of all active ones. Call model.set_adapter(name), or pass adapter_name."
        )
    return active.pop()


def _peft_configs(model: nn.Module) -> dict[str, Any]:
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            return configs
    return {}


def _module_of(path: str, layer: Any, adapter: str) -> LoraModule:
    refuse_variant(layer, adapter, path)
    embedding = adapter in layer.lora_embedding_A
    if embedding:
        A, B = ParameterAt(layer.lora_embedding_A, adapter), ParameterAt(layer.lora_embedding_B, adapter)
    else:
        A, B = (ParameterAt(_bare(factors[adapter]), "weight") for factors in (layer.lora_A, layer.lora_B))
    transposed = embedding or bool(getattr(layer, "fan_in_fan_out", False))
    return LoraModule(canonical_name(path), A, B, float(layer.scaling[adapter]), transposed)


def _bare(module: nn.Module) -> nn.Module:
    """The module inside FSDP1's wrapper, which PEFT's wrapping policy puts around each factor."""
    return getattr(module, "_fsdp_wrapped_module", module)


def _refuse_tied(modules: dict[str, LoraModule]) -> None:
    """Factors in one memory (PEFT's ensure_weight_tying): writing one module would change the other."""
    owners: dict[tuple[torch.device, int], str] = {}
    for name, module in modules.items():
        for tensor in (module.A.tensor, module.B.tensor):
            # A DTensor's storage is elsewhere, and a rank may hold nothing of a partitioned factor.
            owner = owners.setdefault((tensor.device, tensor.data_ptr() or id(tensor)), name)
            if owner != name:
                raise AdapterError(
                    f"modules {owner!r} and {name!r} share one tensor (tied factors), so they cannot be changed apart. "
                    "Set ensure_weight_tying=False, or target only one of them."
                )


def _base_weight(layer: Any) -> Tensor | None:
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    # Subclasses of Tensor are quantised (bitsandbytes, torchao) or sharded (DTensor).
    if type(weight) not in (Tensor, nn.Parameter) or weight.ndim != 2 or 0 in weight.shape:
        return None
    if not weight.is_floating_point() or weight.device.type == "meta":
        return None
    # FSDP1 keeps views of a flat parameter, whose memory it frees between passes.
    there = weight.untyped_storage().nbytes() >= weight.numel() * weight.element_size()
    return weight.detach() if there else None
