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
    return max(0.0, middle - half), min(1.0, middle + half)
