"""Arithmetic: sums and differences of two or three numbers under 100, made by `reasoning-gym` from one seed.

Source: Stojanovski et al., arXiv:2505.24760, task `chain_sum`. Differs: an expression appears once.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

from .packages import package_file
from .rows import check_split, conversation

NUM_TRAIN, NUM_TEST = 1200, 800
_SEED = 7
_TEMPLATE = "What is {expression}? Answer with the number alone."
_SETTINGS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2, "seed": _SEED}


def _chain_sum() -> ModuleType:
    """The one generator, loaded without the package's `__init__`, which imports a hundred others and what they need."""
    folder = package_file("reasoning-gym", "reasoning_gym/arithmetic/chain_sum.py").parents[1]
    with patch.dict(sys.modules):
        for name, path in (("reasoning_gym", folder), ("reasoning_gym.arithmetic", folder / "arithmetic")):
            bare = ModuleType(name)
            bare.__path__ = [str(path)]
            sys.modules[name] = bare
        return import_module("reasoning_gym.arithmetic.chain_sum")


@cache
def _rows() -> tuple[tuple[str, str], ...]:
    """Expression and result of 2,000 distinct problems, in the generator's order."""
    module = _chain_sum()
    config = module.ChainSumConfig(**_SETTINGS, size=2 * (NUM_TRAIN + NUM_TEST))
    problems = module.ChainSumDataset(config)
    answers = {problem["metadata"]["expression"]: problem["answer"] for problem in problems}
    return tuple(answers.items())[: NUM_TRAIN + NUM_TEST]


def arithmetic_prompt(expression: str) -> str:
    """Return the question about one expression."""
    return _TEMPLATE.format(expression=expression)


def arithmetic_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return the split `train` (1,200) or `test` (800) as conversations of a question and a number."""
    check_split("arithmetic", split)
    rows = _rows()[:NUM_TRAIN] if split == "train" else _rows()[NUM_TRAIN:]
    return [conversation(arithmetic_prompt(expression), answer) for expression, answer in rows]
