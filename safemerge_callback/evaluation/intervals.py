"""Intervals of shares."""

from __future__ import annotations

from statistics import NormalDist

from ..errors import ConfigError


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
    # At 0 and at 1 it ends on the share itself, which rounding would leave outside.
    return max(0.0, min(middle - half, value)), min(1.0, max(middle + half, value))


def paired(both: int, first: int, second: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of how much larger the first's share is than the second's, where both were asked the same.

    `both` succeeded for the two, `first` for the first alone, `second` for the second alone, `neither` for none.
    Source: Newcombe 1998, Stat. Med. 17, 2635-2650, method 10: the two Wilson intervals, joined by the correlation of
    the answers, which is taken less than it is found where it is above 0.
    """
    n = both + first + second + neither
    left, right = (both + first, both + second)
    low, high = wilson(left, n, confidence)
    lower, upper = wilson(right, n, confidence)
    p, q = left / n, right / n
    agreement = float(both * neither - first * second)
    agreement = max(agreement - n / 2, 0.0) if agreement > 0 else agreement
    margins = (left * (n - left) * right * (n - right)) ** 0.5
    phi = agreement / margins if margins else 0.0

    def end(one: float, other: float) -> float:
        return max(0.0, one * one - 2 * phi * one * other + other * other) ** 0.5

    return p - q - end(p - low, upper - q), p - q + end(high - p, q - lower)
