"""`asked`: the same weights for every module, those that were asked for."""

from __future__ import annotations

from typing import Any

from .registry import Case, Weights, weights_rule


@weights_rule(by_module=False)
def asked(weights: Weights, _value: Any, case: Case) -> Weights:
    """Return `weights` of `How` for every module."""
    return dict.fromkeys(weights, case.how.weights)
