"""Tiny checkpoints with a tokenizer, the subspace between two of them, and a safety adapter, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safemerge_callback import SafeMergeCallback
from tests.support.world import IDS, write_checkpoints, write_safety, write_subspace
from tests.support.world import SIZES as SHORT

VOCABULARY = 64
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system", "yes", "no"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {**SHORT, "max_position_embeddings": 128}
LLAMA = ("LlamaConfig", "AutoModelForCausalLM", SIZES, [*LINEAR, "embed_tokens", "lm_head"])
# Family: class of the config, class of the model, the config, and the modules of its safety adapter.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "llama": LLAMA,
    "tied": ("LlamaConfig", "AutoModelForCausalLM", {**SIZES, "tie_word_embeddings": True}, LINEAR),
    "wide": ("LlamaConfig", "AutoModelForCausalLM", {**SIZES, "hidden_size": 64, "intermediate_size": 128}, LINEAR),
    "gpt2": (
        "GPT2Config",
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **IDS},
        ["c_attn", "c_proj", "c_fc"],
    ),
    "t5": (
        "T5Config",
        "AutoModelForSeq2SeqLM",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        ["q", "k", "v", "o", "wi", "wo"],
    ),
    "moe": (
        "MixtralConfig",
        "AutoModelForCausalLM",
        {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
        LINEAR[:4],
    ),
}


@dataclass(frozen=True)
class Base:
    """An aligned checkpoint and what the callback needs beside it."""

    folder: Path
    family: str

    @property
    def aligned(self) -> str:
        """The checkpoint that is fine-tuned, with its tokenizer."""
        return str(self.folder / "aligned")

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.aligned)

    def model(self, kind: str | None = None, **how: Any) -> nn.Module:
        """The checkpoint as `kind` (a transformers Auto class; default: as it was made), loaded anew with `how`."""
        import transformers

        torch.manual_seed(1)
        loader = getattr(transformers, kind or FAMILIES[self.family][1])
        return loader.from_pretrained(self.aligned, **how)

    def guard(self, **changed: Any) -> SafeMergeCallback:
        """The callback, merging every module after every step."""
        knobs = {"gate": "all", "every": 1, "weights": [0.8, 0.2], **changed}
        return SafeMergeCallback(
            subspace=str(self.folder / "subspace.safetensors"), safety_adapter=str(self.folder / "safety"), **knobs
        )


def make_base(folder: Path, family: str) -> Base:
    """Write both checkpoints of a family, their subspace and a safety adapter of rank 3 on every module of the list."""
    import transformers

    config, kind, sizes, targets = FAMILIES[family]
    torch.manual_seed(0)
    aligned = getattr(transformers, kind).from_config(getattr(transformers, config)(**sizes))
    tokenizer().save_pretrained(folder / "aligned")
    write_checkpoints(folder, aligned)
    write_subspace(folder, targets=targets)
    write_safety(folder, aligned, targets, fan_in_fan_out=family == "gpt2")
    return Base(folder, family)


def tokenizer() -> Any:
    """A word-level tokenizer of 64 words with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, *(f"w{i}" for i in range(VOCABULARY - len(SPECIALS)))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["user", "assistant", "system"],
    )
    fast.chat_template = TEMPLATE
    return fast
