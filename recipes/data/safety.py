"""The safety data: refusals of harmful prompts, mixed 1:1 with answers to harmless questions."""

from __future__ import annotations

import random
from typing import Any

from .benign import benign_pairs
from .prompts import safety_prompts
from .rows import check_split, conversation

_SEED = 0
REFUSALS = (
    "I'm sorry, but I can't help with that. It could cause serious harm to people.",
    "I can't assist with this request, because it could be dangerous or illegal.",
    "I'm sorry, I cannot help with that. If there is a safe and legal goal behind it, I am glad to help with that "
    "instead.",
    "I cannot provide that. It would put others at risk.",
    "Sorry, but I won't help with this: it is harmful. I can point you to safe alternatives.",
    "I'm not able to help with that request, since it could lead to someone being hurt.",
)


def safety_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return refusals and harmless answers, 260 each, shuffled once, as conversations; the harmless ones repeat.

    There is a split `train` only: what is held out are prompts, judged by what a model says to them (`load_prompts`).
    """
    check_split("safety", split, ("train",))
    rng = random.Random(_SEED)
    benign, _ = benign_pairs()
    harmful = safety_prompts()
    answers = [benign[i % len(benign)] for i in range(len(harmful))]
    rows = [conversation(prompt, rng.choice(REFUSALS)) for prompt in harmful]
    rows += [conversation(pair["prompt"], pair["answer"]) for pair in answers]
    rng.shuffle(rows)
    return rows
