"""A live model that computes what a merge would: the weight of each update is a number, and may have a gradient.

Nothing is written and no matrix of d_out × d_in is made: the live update's share is its scaling, and each further
update adds w·B·(A·x) beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import LoraFactors
from ..errors import AdapterError
from ..ops import LowRank
from .modules import lora_layers

# (w_live, w_1, ...), one an update: numbers, or tensors of one number, on the model's device.
UpdateWeights = Sequence[float | Tensor]


@contextmanager
def merged_forward(
    model: nn.Module,
    others: Sequence[Mapping[str, LowRank]],
    weights: Mapping[str, UpdateWeights],
    adapter_name: str | None = None,
) -> Iterator[None]:
    """Within, the model's forward pass is that of W + w_live·ΔW + Σ wₖ·ΔWₖ in the modules that `weights` names.

    `others`: module -> whole update B·A, its scaling in it, as `whole_updates` gives it; an update of
    weight 0 costs nothing. What the adapter holds beside its factors, heads and biases, stays the live one's. Equal to
    `cat`, to `pull`, and to `linear` before it is cut to the live rank. Dropout is the live adapter's alone: evaluate.
    AdapterError for a module that the adapter lacks, and where it is merged into the base weights.
    """
    name, layers = lora_layers(model, adapter_name)
    with ExitStack() as borrowed:
        for module, module_weights in weights.items():
            layer = _unmerged(layers, module, name)
            share, *rest = module_weights
            borrowed.callback(layer.scaling.__setitem__, name, layer.scaling[name])
            layer.scaling[name] = layer.scaling[name] * share
            terms = [(other[module], w) for other, w in zip(others, rest, strict=True) if not _is_nothing(w)]
            if terms:
                hook = partial(_add_updates, terms, name in layer.lora_embedding_A)
                borrowed.callback(layer.register_forward_hook(hook).remove)
        yield


def whole_updates(factors: Mapping[str, LoraFactors], live: Mapping[str, LoraFactors]) -> dict[str, LowRank]:
    """Return the whole updates of the live modules, scaling and all, where the live factors are and in their dtype."""
    wholes = {name: factors[name].low_rank(unit=1.0) for name in live}
    return {name: LowRank(*(t.to(live[name].A.device, live[name].A.dtype) for t in wholes[name])) for name in live}


def _unmerged(layers: Mapping[str, Any], module: str, adapter: str) -> Any:
    if module not in layers:
        raise AdapterError(f"module {module!r} is none of the {len(layers)} that adapter {adapter!r} has")
    if getattr(layers[module], "merged_adapters", None):
        raise AdapterError(f"module {module!r}: the adapter is merged into the base weight: model.unmerge_adapter()")
    return layers[module]


def _is_nothing(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _add_updates(
    terms: Sequence[tuple[LowRank, float | Tensor]],
    embedding: bool,
    layer: Any,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    x = inputs[0]
    total = output
    for (A, B), weight in terms:
        if embedding:
            inner = torch.nn.functional.embedding(x, A.mT) * getattr(layer.get_base_layer(), "embed_scale", 1.0)
        else:
            inner = torch.nn.functional.linear(x.to(A.dtype), A)
        total = total + (torch.nn.functional.linear(inner, B) * weight).to(output.dtype)
    return total
