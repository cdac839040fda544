"""`soft`: weights that fade in below the gate, so that there is no cliff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...methods.how import How
from .registry import Case, Weights, check_additive, weights_rule


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


def check_soft(how: How) -> None:
    """Raise ConfigError where weights that fade in are asked of a merge that is no weighted sum of the updates."""
    check_additive(how, "soft=True with", "weights that grow with the drift")


def _words(_value: Any) -> str:
    return " (soft)"


@weights_rule(knob="soft", fits=check_soft, grouped=False, words=_words)
def soft(weights: Weights, _value: Any, case: Case) -> Weights:
    """Return weights less of a change, by how far a module's cosine lies below the gate's; see `attenuated`."""
    return {name: _faded(module_weights, name, case) for name, module_weights in weights.items()}


def _faded(weights: tuple[float, ...], name: str, case: Case) -> tuple[float, ...]:
    reading = case.readings.get(name)
    limit = None if reading is None else case.gate.limit(reading)
    return weights if reading is None or limit is None else attenuated(weights, reading.cosine, limit)
