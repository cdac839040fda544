"""One name for a module, however a checkpoint, PEFT, or an adapter file spells it."""

from __future__ import annotations

import re

# Parts that wrappers add anywhere in a module's path and that no model uses itself.
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "base_layer"}
_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.[^.]+)?$")
# In front of a language model, alone or inside a vision-language one, in the spelling of any release of transformers.
_PREFIXES = ("module.", "base_model.model.", "model.", "transformer.", "language_model.", "thinker.")
# Where the spelling inside a path was changed between releases of transformers: the old part, and what it is now.
_RENAMED = (
    (re.compile(r"(^|\.)(\w+_tower|vision_model)\.(?:vision|text)_model(?=\.)"), r"\1\2"),
    (re.compile(r"(^|\.)block_sparse_moe(?=\.)"), r"\1mlp"),
    (re.compile(r"\.router\.layer$"), ".router"),
    (re.compile(r"(\.experts\.\d+)\.w1$"), r"\1.gate_proj"),
    (re.compile(r"(\.experts\.\d+)\.w2$"), r"\1.down_proj"),
    (re.compile(r"(\.experts\.\d+)\.w3$"), r"\1.up_proj"),
)


# By the last part of a name: modules with one row a token, those at the input and those at the output.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_VOCABULARY = (*EMBEDDINGS, "shared", "lm_head", "embed_out", "output")


def is_vocabulary(name: str) -> bool:
    """Return whether a canonical name is an embedding or output head, with one row a token."""
    return name.removesuffix(".bias").rpartition(".")[2] in _VOCABULARY


def canonical_name(name: str) -> str:
    """Return the name under which a module is known everywhere in this package.

    The same for a checkpoint key (`model.layers.0.mlp.up_proj.weight`), a path in a PeftModel, wrapped by DDP, FSDP
    or torch.compile or not (`base_model.model.model.layers.0.mlp.up_proj.base_layer`), and a key of an adapter file
    (`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`): `layers.0.mlp.up_proj`. Idempotent.
    Two modules may still share a name in an unusual model: whoever collects names checks for that.
    """
    while (shorter := _strip_once(name)) != name:
        name = shorter
    return name


def _strip_once(name: str) -> str:
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    name = _FACTOR.sub("", name.removesuffix(".weight"))
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for pattern, spelling in _RENAMED:
        name = pattern.sub(spelling, name)
    return name


def layer_and_type(name: str) -> tuple[int | None, str]:
    """Return a module's layer and what it is in every layer: `layers.3.self_attn.q_proj` is 3 and `self_attn.q_proj`.

    The first number of the name is the layer; further ones, as an expert's, are left out. A name without a number is
    its own type.
    """
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if not numbers:
        return None, name
    kind = ".".join(part for part in parts if not part.isdecimal())
    return numbers[0], kind.removeprefix("layers.")
