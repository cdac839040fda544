"""A folder in which the command line can ask: a base that talks, an adapter of it, prompts and judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .world import SIZES

HARM = ["a b", "c d e", "f", "g h i j", "k l m n o", "p q"]
BENIGN = ["r s", "t", "u v w x"]
FILES = "harm:harm.csv,benign:benign.jsonl"

# In four bits some processors take blocks of 64 by multiples of 32 only.
CHAT_SIZES = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
}


def make_chat_world(folder: Path, tokenizer: Any) -> Path:
    """Write base model, an adapter that changes what it says, two prompt files and judges into a folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # Weights large enough that what it says depends on the prompt.
    base = LlamaForCausalLM(LlamaConfig(**CHAT_SIZES, initializer_range=0.6))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "task")
    (folder / "harm.csv").write_text("id,prompt\n" + "".join(f"{i},{p}\n" for i, p in enumerate(HARM)))
    (folder / "benign.jsonl").write_text("".join(json.dumps({"question": p}) + "\n" for p in BENIGN))
    (folder / "my_judges.py").write_text(
        "def vowels(prompt, response):\n    return any(v in response.split() for v in 'aeiou')\n"
        "def broken(prompt, response):\n    raise TimeoutError('no answer')\n"
    )
    return folder
