"""PEFT's `combination_type` strings, each as the two knobs that it is."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..io.choices import one_of

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
# PEFT's eleven, and `linear_svd` for its `svd`.
COMBINATION_TYPES = {
    "linear": ("linear", "factor"),
    "svd": ("linear", "delta"),
    "linear_svd": ("linear", "delta"),
    "cat": ("cat", "delta"),
    **{name: (name, "factor") for name in _PRUNING},
    **{f"{name}_svd": (name, "delta") for name in _PRUNING},
}


def without_alias(knobs: dict[str, Any]) -> dict[str, Any]:
    """Return `knobs` with PEFT's `combination_type` replaced by `method` and `space`.

    ConfigError where it is unknown, or stands beside one of them.
    """
    if "combination_type" not in knobs:
        return knobs
    knobs = dict(knobs)
    alias = knobs.pop("combination_type")
    clash = sorted({"method", "space"} & knobs.keys())
    if clash:
        raise ConfigError(
            f"combination_type {alias!r} was given beside {clash}: it is an alias of both, give one or the other"
        )
    kind = one_of(alias, sorted(COMBINATION_TYPES), "combination_type")
    knobs["method"], knobs["space"] = COMBINATION_TYPES[kind]
    return knobs
