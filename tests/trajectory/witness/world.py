"""What every run of the witness starts from: tiny checkpoints, their subspaces, adapters and a tokenizer, all relative.

Everything lies in the working folder, which is a fresh one a process: no path that is told differs between two sides.
"""

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from safemerge_callback import build_subspace, compress_subspace
from tests.support.world import ADAPTED, SIZES

SUBSPACE, INT8, TRUNCATED = (f"{name}.safetensors" for name in ("subspace", "int8", "truncated"))


@dataclass
class World:
    """The aligned model in memory, and its tokenizer; the rest are files under the names above and below."""

    aligned: torch.nn.Module
    tokenizer: object

    def model(self, seed=1, targets=ADAPTED, **lora):
        """The aligned model with a fresh adapter, which is random in A alone."""
        torch.manual_seed(seed)
        config = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **lora}
        return get_peft_model(copy.deepcopy(self.aligned), LoraConfig(**config))


def make_world():
    """Write what the runs start from, and return the world.

    `aligned` and `unaligned`, the subspaces, and the adapters `safety`, `second`, `even` and `task`.
    """
    torch.manual_seed(0)
    world = World(
        LlamaForCausalLM(LlamaConfig(**{**SIZES, "max_position_embeddings": 128, "initializer_range": 0.2})),
        word_tokenizer(),
    )
    world.aligned.save_pretrained("aligned")
    world.tokenizer.save_pretrained("aligned")
    unaligned = copy.deepcopy(world.aligned)
    with torch.no_grad():
        for parameter in unaligned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    unaligned.save_pretrained("unaligned")
    sources = {"aligned": "aligned", "unaligned": "unaligned", "target_modules": ADAPTED}
    build_subspace(SUBSPACE, **sources, device="cpu", progress=False)
    compress_subspace(SUBSPACE, INT8, progress=False)
    compress_subspace(SUBSPACE, TRUNCATED, "truncated", 4, progress=False)
    world.aligned.name_or_path = "aligned"
    for seed, (folder, rank) in enumerate({"safety": 3, "second": 2, "even": 4, "task": 4}.items(), start=5):
        save_adapter(world, folder, rank, seed)
    return world


def save_adapter(world, folder, rank, seed):
    """A random adapter of the world's modules, whose update is not zero, saved by PEFT."""
    model = world.model(seed, r=rank, lora_alpha=2 * rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)


def word_tokenizer():
    """One token a word, 64 of them, with a chat template."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "<end>", "user", "bot", *"abcdefghijklmnopqrstuvwxyz", "sorry", "cannot", "yes"]
    words += [f"w{number}" for number in range(64 - len(words))]
    built = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}<s> {{ 'user' if m.role == 'user' else 'bot' }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<s> bot{% endif %}"
    )
    special = {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, **special)
