"""Shares and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TypedDict

from ..errors import ConfigError
from .units import SHARE


class Row(TypedDict):
    """A measured share: `value` of `n`, in [0, 1], and its 95 % Wilson interval, `low` to `high`; `unit` says so."""

    measure: str
    n: int
    value: float
    low: float
    high: float
    unit: str


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share, (low, high) in [0, 1]; (0, 1) where n is 0.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22. Holds its coverage at few trials and at shares near 0 and 1, where the
    normal interval does not.
    """
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise ConfigError(
            f"{successes} of {n} at confidence {confidence}: need 0 <= successes <= n and 0 < confidence < 1"
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    value = successes / n
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (value * (1 - value) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def share(measure: str, verdicts: Sequence[bool]) -> Row:
    """Return how many of the verdicts hold, under the name `measure`; ConfigError where there is no verdict."""
    if not verdicts:
        raise ConfigError(f"measure {measure!r} has nothing to judge: give at least one prompt, or leave it out")
    low, high = wilson(sum(verdicts), len(verdicts))
    return Row(measure=measure, n=len(verdicts), value=sum(verdicts) / len(verdicts), low=low, high=high, unit=SHARE)
