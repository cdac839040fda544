"""`spread`: the weights are a run's total, shared out over its merges.

No rule of modules: it changes what is asked of one merge, before the rules decide what each module gets of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ...methods.how import How
from .by_pattern import MODULE_WEIGHTS
from .registry import check_additive


def spread(weights: tuple[float, ...], events: int) -> tuple[float, ...]:
    """Return the weights of each of `events` merges that together leave what one merge with `weights` would.

    Of w_live its `events`-th root. Each later merge shrinks what earlier ones put in, so every w_safety is divided by
    the geometric sum 1 + w + ... + w^(events - 1) of that root w: with no training in between, n merges of one adapter
    give w_live·ΔW + w_safety·ΔW_safety exactly. Source: none. ConfigError for w_live of 0, which has nothing to share
    out.
    """
    live, *safety = weights
    if events < 1 or live <= 0:
        raise ConfigError(f"weights={weights} over {events} merges: w_live must be above 0, and one merge the least")
    root = float(live ** (1.0 / events))
    total = sum(root**i for i in range(events))
    return (root, *(w / total for w in safety))


def one_of_many(how: How, knobs: Mapping[str, Any], events: int) -> tuple[How, dict[str, Any]]:
    """Return what is asked of each of `events` merges, and of the weights rules then, as `spread` shares it out."""
    shared = dict(knobs)
    if patterns := knobs.get(MODULE_WEIGHTS.name):
        shared[MODULE_WEIGHTS.name] = {pattern: spread(tuple(weights), events) for pattern, weights in patterns.items()}
    return replace(how, weights=spread(how.weights, events)), shared


def check_spread(how: How) -> None:
    """Raise ConfigError where a total is to be shared out by a method whose n merges are not one of their product.

    A method that prunes would prune n times over, one that averages divides each time, `slerp` walks n arcs,
    `orthogonal` finds the safety update inside its own span after the first, and in factor space every merge adds cross
    terms. The average that `ema` goes to moves.
    """
    if "average" in how.needs:
        raise ConfigError(
            f"spread_weights is true, and what method {how.method!r} goes to moves at every step: leave it out"
        )
    check_additive(how, "spread_weights is true, and", "weights that many merges share")
