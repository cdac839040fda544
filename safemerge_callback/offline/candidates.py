"""Which of several safety adapters are worth trying: one of each cluster, and none that is the fine-tuned update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..ops import LowRank, inner_product, squared_norm

# Model-GLUE's: at this cosine two candidates are one.
SAME_CLUSTER = 0.95
# Below this distance, as a share of the update, an update is the fine-tuned one.
_EQUAL = 1e-6


def update_cosine(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> float:
    """Return ⟨ΔW, ΔW'⟩/(‖ΔW‖·‖ΔW'‖) over all modules of `one` together; 0 where an update is 0."""
    product = sum(float(inner_product(one[name], other[name])) for name in one)
    norms = [sum(float(squared_norm(each[name])) for name in one) for each in (one, other)]
    return product / math.sqrt(norms[0] * norms[1]) if all(norms) else 0.0


def clusters(updates: Sequence[Mapping[str, LowRank]], cosine: float = SAME_CLUSTER) -> list[list[int]]:
    """Return the places of updates in clusters: each joins the first whose first member it is near enough to.

    Source: Model-GLUE, arXiv:2410.05357, which compares parameters at 0.95. Differs: updates are compared, since
    parameters of one base are alike whatever was trained; and one that is near none is a cluster of its own, which the
    release drops.
    """
    groups: list[list[int]] = []
    for place, update in enumerate(updates):
        near = (group for group in groups if update_cosine(updates[group[0]], update) >= cosine)
        group = next(near, None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return groups


def is_equal(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> bool:
    """Return whether two updates are one, up to rounding: no weights between them can be told apart."""
    norm, distance = 0.0, 0.0
    for name, mine in one.items():
        mine_squared, theirs = float(squared_norm(mine)), float(squared_norm(other[name]))
        norm += mine_squared
        distance += mine_squared + theirs - 2 * float(inner_product(mine, other[name]))
    return distance <= _EQUAL * norm
