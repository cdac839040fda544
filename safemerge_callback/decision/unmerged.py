"""What of a safety adapter a merge leaves out, in words: all that is no update of a LoRA module that both have."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..adapters import Adapter
from ..adapters.beside import Base, canonical_tensor, left_beside, listed

_ADVICE = (
    "only updates of LoRA modules that the fine-tuned adapter has are merged. Train the safety adapter without "
    "modules_to_save, bias and trainable tokens, on the same target modules, or take the rest over by hand"
)


def unmerged(safety: Adapter, modules: Collection[str], base: Base) -> str:
    """Return what of `safety` a merge into the LoRA `modules` leaves out, as one line; empty where it is nothing.

    What is equal to the base model's is not told: copies that PEFT saves of its own accord (resized or adapted
    embeddings), and what was to be trained and was not. What cannot be compared is told where the adapter's config says
    that it was trained.
    """
    beside = left_beside(safety, base)
    known = {*modules}
    lone = [name for name in safety.factors if name not in known]
    updates = [f"the updates of {listed(lone)}, modules that the fine-tuned adapter lacks"] if lone else []
    return "; ".join([*beside, *updates])


def warning_of(left: Mapping[str, str]) -> str | None:
    """Return one warning of what is left out of all safety adapters, source -> `unmerged`; None where it is nothing."""
    phrases = ", ".join(f"of safety adapter {source!r} {words}" for source, words in left.items() if words)
    return f"left out are {phrases}: {_ADVICE}" if phrases else None


def base_tensors(model: nn.Module) -> Base:
    """Return a live model's base tensors by canonical name, without what its adapters hold of them.

    None for tensors that are sharded, packed or not in memory.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in model.named_parameters(remove_duplicate=False):
        name, kind = canonical_tensor(key)
        if kind != "modules_to_save" and ".lora_" not in key and _at_hand(value):
            tensors[name] = value
    return tensors.get


def _at_hand(value: Tensor) -> bool:
    plain = type(value) is nn.Parameter and value.is_floating_point() and value.device.type != "meta"
    # FSDP1 keeps views of a flat parameter, whose memory it frees between passes.
    return plain and 0 < value.numel() * value.element_size() <= value.untyped_storage().nbytes()
