"""How much a merge changes: weights that fade in below the gate, and weights that share a total over many events."""

from __future__ import annotations

from ..errors import ConfigError


def attenuated(weights: tuple[float, float], cosine: float, limit: float) -> tuple[float, float]:
    """Return (w_live, w_safety) at `cosine`: (1, 0) from `limit` up, the asked `weights` at 0, linear in between.

    So there is no cliff: a module just below the gate is hardly changed. `limit` is the cosine that the gate merges
    below. Source: none.
    """
    if not cosine < limit:
        return 1.0, 0.0
    share = min(1.0, 1.0 - cosine / limit) if limit > 0 else 0.0
    live, safety = weights
    return 1.0 + share * (live - 1.0), share * safety


def spread(weights: tuple[float, float], events: int) -> tuple[float, float]:
    """Return the weights of each of `events` merges that together leave what one merge with `weights` would.

    Of w_live its `events`-th root. Each later merge shrinks what earlier ones put in, so w_safety is divided by the
    geometric sum 1 + w + ... + w^(events - 1) of that root w: with no training in between, n merges of one adapter give
    w_live·ΔW + w_safety·ΔW_safety exactly. Source: none. ConfigError for w_live of 0, which has nothing to share out.
    """
    live, safety = weights
    if events < 1 or live <= 0:
        raise ConfigError(f"weights={weights} over {events} merges: w_live must be above 0, and one merge the least")
    root = float(live ** (1.0 / events))
    return root, safety / sum(root**i for i in range(events))


def check_soft(soft: bool, method: str, space: str) -> None:
    """Raise ConfigError where weights that differ by module are asked of a merge that has one pair for all."""
    if soft and (method, space) != ("linear", "delta"):
        raise ConfigError(
            f"soft=True with method {method!r} in space {space!r}: weights that grow with the drift are those of a sum "
            "of updates, so use method 'linear' in space 'delta'"
        )
