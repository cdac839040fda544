"""A live model as it is once quantised: what a deployment in four bits will say, asked before it is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, first_line
from ..io.choices import one_of

# 4bit: bitsandbytes' NF4 in blocks of 64, without double quantisation; what is computed stays in the weight's dtype.
QUANTISED = ("4bit",)
# LoRA's factors, which stay as they are beside a quantised base.
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def check_quantised(kind: str) -> str:
    """Return the kind of quantisation; ConfigError for one that is unknown, and where bitsandbytes is not installed."""
    one_of(kind, QUANTISED, "--after-quantize")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--after-quantize {kind} needs bitsandbytes: pip install 'safemerge-callback[quantized]', or leave it out"
        )
    return kind


def quantise(model: nn.Module, kind: str = "4bit") -> int:
    """Quantise each linear layer of a model where it lies, in place, and return how many there are.

    As transformers quantises a checkpoint that is loaded so: output embeddings, norms and what is no linear layer stay,
    and so do LoRA factors on top. ConfigError where there is no such layer, and where bitsandbytes cannot on this
    device; the model is then good for nothing.
    """
    check_quantised(kind)
    kept = {id(head) for head in (_head(module) for module in model.modules()) if head is not None}
    layers = [
        (parent, name, layer)
        for path, parent in model.named_modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and id(layer) not in kept and not set(path.split(".")) & {*_FACTORS}
    ]
    if not layers:
        raise ConfigError("the model has no linear layer to quantise: it is quantised already, or of another kind")
    try:
        for parent, name, layer in layers:
            setattr(parent, name, _four_bits(layer))
        _check_passes([getattr(parent, name) for parent, name, _ in layers])
    # Its kernels assert what sizes they take.
    except (RuntimeError, ValueError, TypeError, ImportError, AssertionError) as error:
        raise ConfigError(
            f"bitsandbytes cannot quantise this model on {layers[0][2].weight.device} here ({first_line(error)}): ask "
            "on another --device, or leave --after-quantize out"
        ) from error
    return len(layers)


def _check_passes(layers: Sequence[Any]) -> None:
    """Let a layer of each size take an input: what bitsandbytes cannot on a device it says no sooner."""
    by_size = {(layer.in_features, layer.out_features): layer for layer in layers}
    for (width, _), layer in by_size.items():
        with torch.no_grad():
            layer(torch.zeros(1, int(width), dtype=layer.compute_dtype, device=layer.weight.device))


def _head(module: nn.Module) -> Any:
    getter = getattr(module, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _four_bits(layer: nn.Linear) -> nn.Module:
    """The layer in four bits, on the device where it was."""
    import bitsandbytes

    weight, device = layer.weight, layer.weight.device
    kind: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    small = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=weight.dtype, device="meta", **kind
    )
    small.weight = bitsandbytes.nn.Params4bit(weight.detach().to("cpu"), requires_grad=False, **kind)
    small.bias = layer.bias
    return small.to(device).eval()
