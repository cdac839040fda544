"""What is not a plain LoRA, and therefore not s·B·A: refused by name, never measured approximately."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError

# Switches of PEFT's LoraConfig that make the update something else than s·B·A on the module's own weight.
_SWITCHES = {
    "use_dora": "DoRA also rescales the base weight",
    "lora_bias": "lora_bias adds a bias to the update",
    "target_parameters": "LoRA on bare parameters (target_parameters) has one update per expert",
    "alora_invocation_tokens": "aLoRA is active on some tokens only",
    "arrow_config": "Arrow routes between several adapters",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "use_qalora": "QALoRA pools the inputs",
    "kasa_config": "KaSA changes the base weight",
    "velora_config": "VeLoRA is a LoRA variant",
    "monteclora_config": "MonteCLoRA samples its factors",
    "megatron_config": "Megatron shards the factors over devices",
    "layer_replication": "layer_replication renumbers the layers, so names no longer match the base checkpoint",
}
# Initialisations that move part of the base weight into the factors: s·B·A is then not what training changed.
_MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ADVICE = "Use a plain LoRA (LoraConfig without that setting)."


def moves_base(config: Mapping[str, Any]) -> bool:
    """Return whether a PEFT config's initialisation moves a part of the base weight into the factors."""
    return str(config.get("init_lora_weights")).lower().startswith(_MOVED_BASE)


def refuse_config(config: Mapping[str, Any], where: str, *, moved_base: bool = False) -> None:
    """Raise AdapterError when a PEFT config is not of a plain LoRA; `where` says whose config it is.

    `moved_base` accepts initialisations that move a part of the base weight into the factors.
    """
    kind = config.get("peft_type")
    kind = str(getattr(kind, "value", kind))
    if kind != "LORA":
        raise AdapterError(f"{where} is of type {kind}; allowed is LORA only. {_ADVICE}")
    for switch, why in _SWITCHES.items():
        if config.get(switch):
            raise AdapterError(f"{where} has {switch}={config[switch]!r}: {why}, which is not supported. {_ADVICE}")
    if str(config.get("init_lora_weights")).lower() == "mica":
        raise AdapterError(f"{where} has init_lora_weights='mica', which freezes B: a merge must write both. {_ADVICE}")
    if moves_base(config) and not moved_base:
        raise AdapterError(
            f"{where} has init_lora_weights={config['init_lora_weights']!r}, which moves part of the base weight into "
            "the factors, so B·A is not the change that training made. Live, give writer_for the factors at which "
            "training began (initial); on disk, convert it to a plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )


def refuse_tuner(layer: Any, path: str) -> None:
    """Raise AdapterError when a PEFT layer of a live model is of another kind than LoRA on a linear map."""
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.lora import layer as lora

    kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
    if not isinstance(layer, lora.LoraLayer) or isinstance(layer, AdaLoraLayer):
        raise AdapterError(f"module {path!r} is adapted by {kind}; allowed is LoRA only. {_ADVICE}")
    refused = (lora._ConvNd, lora.MultiheadAttention, lora.ParamWrapper)
    if isinstance(layer, refused) or type(layer).__name__ == "LoraParallelLinear":
        raise AdapterError(
            f"module {path!r} is adapted by {kind}, whose update is not one matrix on one weight; allowed are Linear, "
            "Conv1D and Embedding modules. Leave it out of target_modules (and target_parameters)."
        )


def refuse_variant(layer: Any, adapter_name: str, path: str) -> None:
    """Raise AdapterError when adapter `adapter_name` of a live LoRA layer is a variant, has a bias, or is merged."""
    variant = layer.lora_variant.get(adapter_name)
    dora = layer.use_dora.get(adapter_name) or adapter_name in layer.lora_magnitude_vector
    if variant is not None or dora:
        kind = "DoRA" if dora else type(variant).__name__
        raise AdapterError(f"module {path!r}: adapter {adapter_name!r} is a variant, {kind}. {_ADVICE}")
    if layer.lora_bias.get(adapter_name):
        raise AdapterError(f"module {path!r}: adapter {adapter_name!r} has lora_bias=True. {_ADVICE}")
    if layer.merged_adapters:
        raise AdapterError(
            f"module {path!r}: adapters {list(layer.merged_adapters)} are merged into the base weight, so a changed "
            "factor would not count. Call model.unmerge_adapter() first."
        )
