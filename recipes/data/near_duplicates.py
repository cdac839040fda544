"""Near-duplicates among short prompts: two that share most of their content words.

Two prompts are near-duplicates where the Jaccard index of their sets of content words (lower case, letters and digits,
a few function words dropped, a plural's s dropped) is at least 0.55; 163 of AdvBench's 520 have such a neighbour. A
group is a connected component, so that a paraphrase of a paraphrase never straddles a split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.55
_DROPPED_WORDS = (
    "a an and are as at be by can for from give how i in into is it me of on or so that the their this to up using who "
    "with without you your"
)
_DROPPED = frozenset(_DROPPED_WORDS.split(" "))


def content_words(text: str) -> frozenset[str]:
    """Return the set of content words of a prompt."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return frozenset(w[:-1] if w.endswith("s") and len(w) > 3 else w for w in words if w not in _DROPPED)


def are_near(x: frozenset[str], y: frozenset[str]) -> bool:
    """Whether two sets of content words are near-duplicates; two empty sets are."""
    return len(x & y) >= THRESHOLD * len(x | y)


def groups(texts: Sequence[str]) -> list[list[int]]:
    """Return the indices of `texts` in groups of near-duplicates, in order of first appearance."""
    near = _near(texts, texts)
    group = list(range(len(texts)))
    for i, j in zip(*np.nonzero(np.tril(near, -1)), strict=True):
        if group[i] != group[j]:
            old, new = max(group[i], group[j]), min(group[i], group[j])
            group = [new if g == old else g for g in group]
    members: dict[int, list[int]] = {}
    for index, name in enumerate(group):
        members.setdefault(name, []).append(index)
    return list(members.values())


def without_near(texts: Iterable[str], seen: Iterable[str]) -> list[str]:
    """Return `texts` less whatever is a near-duplicate of a text in `seen`."""
    candidates, known = list(texts), list(seen)
    lost: NDArray[np.bool_] = np.any(_near(candidates, known), axis=1)
    return [text for text, near in zip(candidates, lost, strict=True) if not near]


def _near(x: Sequence[str], y: Sequence[str]) -> NDArray[np.bool_]:
    """`are_near` of all pairs at once, (len(x), len(y)): words in common are one product of two 0/1 matrices."""
    words = [[content_words(text) for text in texts] for texts in (x, y)]
    place = {word: i for i, word in enumerate(sorted({w for rows in words for row in rows for w in row}))}
    tables = [np.zeros((len(rows), len(place)), dtype=np.float32) for rows in words]
    for table, rows in zip(tables, words, strict=True):
        for i, row in enumerate(rows):
            table[i, [place[word] for word in row]] = 1
    shared = (tables[0] @ tables[1].T).astype(np.float64)
    either = tables[0].sum(1, dtype=np.float64)[:, None] + tables[1].sum(1, dtype=np.float64)[None] - shared
    return shared >= THRESHOLD * either
