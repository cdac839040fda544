"""How much a merge changes: weights that fade in below the gate, and weights that share a total over many events."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from ..methods import get_method

_ROUNDING = 1e-9


def attenuated(weights: Sequence[float], cosine: float, limit: float) -> tuple[float, ...]:
    """Return (w_live, w_safety, ...) at `cosine`: (1, 0, ...) from `limit` up, linear down to the `weights` at 0.

    So there is no cliff: a module just below the gate is hardly changed. `limit` is the cosine that the gate merges
    below. Source: none.
    """
    live, *safety = weights
    if not cosine < limit:
        return (1.0, *(0.0 for _ in safety))
    share = min(1.0, 1.0 - cosine / limit) if limit > 0 else 0.0
    return (1.0 + share * (live - 1.0), *(share * w for w in safety))


def spread(weights: Sequence[float], events: int) -> tuple[float, ...]:
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


def share_left(task_weight: float, merges: int, floor: float = 0.0, before: float = 1.0) -> float:
    """Return the share of an update that is left after `merges` merges that each leave `task_weight` of it.

    `before`: the share that earlier ones have left. A merge that would leave less than `floor` is held back, as in
    `under_floor`. Exact for a sum of updates but for what its rank loses.
    """
    left = before
    for _ in range(merges):
        if under(left * task_weight, floor):
            break
        left *= task_weight
    return left


def under(share: float, floor: float) -> bool:
    """Whether `share`, a product of rounded weights, lies under `floor`; 0.8 three times over is not under 0.512."""
    return share < floor - _ROUNDING


def check_soft(soft: bool, method: str, space: str) -> None:
    """Raise ConfigError where weights that fade in are asked of a merge that is no weighted sum of the updates."""
    if soft:
        _check_additive("soft=True with", "weights that grow with the drift", method, space)


def check_spread(spread_weights: bool, method: str, space: str) -> None:
    """Raise ConfigError where a total is to be shared out by a method whose n merges are not one of their product.

    A method that prunes would prune n times over, one that averages divides each time, `slerp` walks n arcs,
    `orthogonal` finds the safety update inside its own span after the first, and in factor space every merge adds cross
    terms. The average that `ema` goes to moves.
    """
    if spread_weights and method == "ema":
        raise ConfigError("spread_weights is true, and what method 'ema' goes to moves at every step: leave it out")
    if spread_weights:
        _check_additive("spread_weights is true, and", "weights that many merges share", method, space)


def _check_additive(what: str, whose: str, method: str, space: str) -> None:
    if space not in get_method(method).additive:
        raise ConfigError(
            f"{what} method {method!r} in space {space!r}: {whose} must be those of a sum of updates, "
            "so use method 'linear' or 'pull' in space 'delta'"
        )
