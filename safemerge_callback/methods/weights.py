"""What each update weighs in a merge: what the user may ask for, and what stands where nothing was asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, shown
from ..io.choices import one_of
from ..io.numbers import is_number
from .registry import METHODS, Method, get_method, readers

LARGEST_WEIGHT = 2.0
DEFAULT_WEIGHTS = (0.8, 0.2)


def check_merge(method: str, space: str, weights: Sequence[float], adapters: int | None = None) -> tuple[float, ...]:
    """Return `weights` = (w_live, w_safety, ...) as floats.

    ConfigError for an unknown method or space, weights outside [-2, 2] or that sum to 0, w_live below 0, a negative one
    where the method gives it no meaning, or another number of them than 1 + `adapters` (None: not known yet).
    """
    rule = get_method(method)
    one_of(space, sorted(rule.spaces), "space", problem=f"is not one that method {method!r} works in")
    numbers = _numbers(weights)
    _check_number(rule, len(numbers) - 1, weights)
    if adapters is not None and rule.weighted and len(numbers) != 1 + adapters:
        raise ConfigError(f"weights={shown(weights)} with {adapters} safety adapters: {_wanted(adapters)}")
    if min(numbers) < 0 and not (rule.signed and numbers[0] >= 0):
        able = sorted(name for name, other in METHODS.items() if other.signed)
        raise ConfigError(
            f"weights={shown(weights)} with method {method!r}: a negative weight takes an update away, which has a "
            f"meaning for a safety adapter in {able}: give others from 0 to {LARGEST_WEIGHT:g}"
        )
    if sum(numbers) == 0:
        raise ConfigError(
            f"weights={shown(weights)} sum to 0: the merge would take away all that it adds, change one of them"
        )
    return numbers


def merge_weights(
    method: str, weights: Sequence[float] | None, strength: float | None, adapters: int | None = None
) -> Sequence[float]:
    """Return the weights of a merge, not yet checked: those given, or those that the method has by itself.

    A method with a strength has (1 - strength, strength), and takes no other weights. Others have (0.8, 0.2), the
    released SafeMERGE's (arXiv:2503.17239), where there is one safety adapter. ConfigError for a strength that is not
    read or not in (0, 1], weights that contradict it, and weights left out with several adapters.
    """
    rule = get_method(method)
    if rule.strength is not None:
        if weights is not None:
            return _way(method, weights, strength)
        share = checked_share(method, rule.strength if strength is None else strength)
        return (1.0 - share, share)
    if strength is not None:
        able = sorted({*(name for name, other in METHODS.items() if other.strength is not None), *readers("strength")})
        raise ConfigError(
            f"strength is {shown(strength)}, which method {method!r} does not read: give weights, or choose one of "
            f"{able}"
        )
    if weights is None and (adapters or 0) > 1:
        raise ConfigError(f"weights are missing with {adapters} safety adapters: {_wanted(adapters or 0)}")
    return DEFAULT_WEIGHTS if weights is None else weights


def _wanted(adapters: int) -> str:
    names = ", ".join(["w_live", *(f"w_safety_{i + 1}" for i in range(adapters))])
    return f"give {adapters + 1} numbers, ({names})" if adapters > 1 else "give two, (w_live, w_safety)"


def _check_number(rule: Method, adapters: int, weights: Any) -> None:
    if adapters > 1 and not rule.several:
        raise ConfigError(
            f"weights={shown(weights)} with method {rule.name!r}, which goes from one update to one other: give two, "
            "or choose a method that takes several, such as 'linear'"
        )


def _numbers(weights: Any) -> tuple[float, ...]:
    allowed = (
        "give finite numbers (w_live, w_safety), one more for each further adapter, w_live from 0 to "
        f"{LARGEST_WEIGHT:g} and others from {-LARGEST_WEIGHT:g}, not all 0"
    )
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) < 2:
        raise ConfigError(f"weights={shown(weights)}: {allowed}")
    inside = [is_number(w) and abs(w) <= LARGEST_WEIGHT for w in weights]
    if not all(inside) or not any(weights):
        raise ConfigError(f"weights={shown(weights)}: {allowed}")
    return tuple(float(w) for w in weights)


def _way(method: str, weights: Any, strength: Any) -> tuple[float, ...]:
    """Weights that say what a strength says."""
    numbers = _numbers(weights)
    share = numbers[-1] if strength is None else checked_share(method, strength)
    if len(numbers) != 2 or not math.isclose(sum(numbers), 1.0) or not math.isclose(numbers[1], share):
        said = "" if strength is None else f" beside strength {shown(strength)}"
        raise ConfigError(
            f"weights are {shown(weights)}{said}, and method {method!r} goes a share of the way to its target: leave "
            "them out and give strength, that share"
        )
    checked_share(method, numbers[1])
    return numbers


def check_way(method: str, weights: Sequence[float]) -> None:
    """Raise ConfigError unless a module's weights are a part of a method's way: (1 - share, share), 0 is to stay."""
    if len(weights) != 2 or not 0 <= weights[1] <= 1 or not math.isclose(sum(weights), 1.0):
        raise ConfigError(
            f"weights are {shown(weights)}, and method {method!r} goes a share of the way to its target: give "
            "[1 - share, share], the share from 0 to 1"
        )


def checked_share(method: str, strength: Any) -> float:
    """Return the strength of a method, the share of the way that it goes; ConfigError unless it is in (0, 1]."""
    if not is_number(strength) or not 0 < strength <= 1:
        raise ConfigError(
            f"strength is {shown(strength)}: method {method!r} goes this share of the way to its target, give one "
            "above 0 and at most 1"
        )
    return float(strength)
