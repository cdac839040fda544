"""What a model answers, worked out without anything that the package or `generate()` does."""

from __future__ import annotations

from typing import Any

import torch


def one_by_one(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The greedy response by plain argmax over the whole sequence: no batch, no padding, no cache, no generate()."""
    ids = tokenizer(f"<s> user {prompt} <end> <s> bot", add_special_tokens=False)["input_ids"]
    said: list[int] = []
    while len(said) < max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True).strip()
