"""What methods that prune and methods that elect a sign ask for: knobs that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, shown
from ..io.choices import one_of
from ..io.knobs import Knob
from ..io.numbers import is_number
from ..ops import SIGN_METHODS


def _density(value: Any, beside: Mapping[str, Any]) -> float:
    """A method that prunes has no density of its own: one that is left out is refused, too."""
    allowed = "give the share of entries to keep, above 0 and at most 1, such as 0.5"
    if value is None:
        raise ConfigError(f"density is missing, method {beside['method']!r} prunes by it: {allowed}")
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"density is {shown(value)}: {allowed}")
    return float(value)


def _sign(value: Any, _beside: Mapping[str, Any]) -> str:
    return one_of(value, SIGN_METHODS, "majority_sign_method")


DENSITY = Knob("density", "Share of entries that methods which prune keep, above 0 and at most 1.", _density)
MAJORITY_SIGN = Knob(
    "majority_sign_method",
    "Whose sign ties, dare_ties and della take: total (of sums) or frequency.",
    _sign,
    default=SIGN_METHODS[0],
    idle="but method {reader!r} elects no sign",
)


def needed_density(method: str, density: float | None) -> float:
    """Return `density` for a method that prunes by it; ConfigError if it is None or outside (0, 1]."""
    return _density(density, {"method": method})
