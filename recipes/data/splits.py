"""Validation and test: every prompt and row belongs to one of them, with all its near-duplicates.

Thresholds, weights and whatever else is chosen are chosen on the validation split. The test split is read once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

from safemerge_callback.errors import ConfigError

from . import load_prompts
from .near_duplicates import groups
from .tasks import Task, task_rows, text_of

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
# What the test split has at least: of each harmful set, of harmless prompts, of a task's rows.
LEAST = {"harmbench": 150, "strongreject": 150, "advbench": 150, "benign": 120, "task": 400}
# Harmless prompts of both kinds are one measure.
SETS: dict[str, tuple[str, ...]] = {
    "harmbench": ("harmbench",),
    "strongreject": ("strongreject",),
    "advbench": ("advbench",),
    "benign": ("benign", "benign_edgy"),
}
_SEED = 0


def dealt(
    near_groups: Sequence[Sequence[int]], set_of: Sequence[str], least: Mapping[str, int]
) -> dict[Split, list[int]]:
    """Deal whole groups of indices: to test until its first member's set has `least` there, else to validation.

    `near_groups`: groups over all sets; `set_of`: the set of each index. The order is drawn once, from a fixed seed.
    """
    order = list(near_groups)
    random.Random(_SEED).shuffle(order)
    split: dict[Split, list[int]] = {"validation": [], "test": []}
    have = dict.fromkeys(least, 0)
    for group in order:
        side: Split = "test" if have[set_of[group[0]]] < least[set_of[group[0]]] else "validation"
        split[side] += group
        if side == "test":
            for index in group:
                have[set_of[index]] += 1
    return split


@cache
def _prompts() -> dict[Split, dict[str, tuple[str, ...]]]:
    """Every set's prompts by split. Groups are of all sets together: a prompt may be in two of them."""
    pairs = {text: name for name, parts in SETS.items() for part in parts for text in load_prompts(part)}
    texts, set_of = list(pairs), list(pairs.values())
    split = dealt(groups(texts), set_of, LEAST)
    return {
        side: {name: tuple(texts[i] for i in members if set_of[i] == name) for name in SETS}
        for side, members in split.items()
    }


def prompts_of(name: str, split: Split, n: int | None = None) -> list[str]:
    """Return the prompts of a set in a split, the first `n` of them (None: all)."""
    return list(_prompts()[check_split_name(split)][name][:n])


@cache
def _rows(task: Task) -> dict[Split, tuple[dict[str, Any], ...]]:
    rows = task_rows(task)
    texts = [text_of(row) for row in rows]
    near_groups = groups(texts) if task.by_words else [[i] for i in range(len(texts))]
    split = dealt(near_groups, [task.name] * len(rows), {task.name: LEAST["task"]})
    return {side: tuple(rows[i] for i in members) for side, members in split.items()}


def rows_of(task: Task, split: Split, n: int | None = None) -> list[dict[str, Any]]:
    """Return a task's rows in a split, the first `n` of them (None: all)."""
    return list(_rows(task)[check_split_name(split)][:n])


def check_split_name(split: str) -> Split:
    """Return the split; ConfigError for any other name."""
    for name in SPLITS:
        if split == name:
            return name
    raise ConfigError(f"split {split!r} is unknown: choose validation or test")
