"""How much one measure lies above another, with its interval: prompt by prompt where both were asked the same."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import ConfigError
from .intervals import paired, wilson
from .measure import Share
from .units import SHARE, within_share


class Estimate(NamedTuple):
    """What is known of a number: a share, another score, or a difference of two, with its 95 % interval.

    n of the smaller side, 0 where it is not known.
    """

    value: float
    low: float
    high: float
    n: int


def counts(share: Share) -> bool:
    """Whether it is a part of 1 of a known number, so that it has an interval."""
    known = share["unit"] == SHARE and bool(share["n"]) and share["value"] is not None
    return known and within_share(share["value"], share["low"], share["high"])


def has_interval(share: Share) -> bool:
    """Whether it has an interval, or counts that one can be made of."""
    return counts(share) or None not in (share["value"], share["low"], share["high"])


def estimate_of(share: Share) -> Estimate:
    """Return the measure's own figures, a share with Wilson's interval where it came without one.

    ConfigError for one that lacks it (`has_interval`).
    """
    n, value, low, high = int(share["n"] or 0), share["value"], share["low"], share["high"]
    if value is not None and (low is None or high is None) and counts(share):
        low, high = wilson(round(value * n), n)
    if value is None or low is None or high is None:
        raise ConfigError(f"measure {share['measure']!r} has no interval: give one of a known number of prompts")
    return Estimate(value, low, high, n)


def difference(more: Estimate, less: Estimate) -> Estimate:
    """Return `more` minus `less`, with Newcombe's interval: each end takes the nearer end of one and the other's."""
    value = more.value - less.value
    low = value - ((more.value - more.low) ** 2 + (less.high - less.value) ** 2) ** 0.5
    high = value + ((more.high - more.value) ** 2 + (less.value - less.low) ** 2) ** 0.5
    return Estimate(value, low, high, min(more.n, less.n))


def is_paired(one: Share, other: Share) -> bool:
    """Whether both have an outcome a prompt, of the same prompts: by digest, where that is known of either."""
    same = one["prompts"] == other["prompts"] and len(one["outcomes"]) == len(other["outcomes"])
    return same and bool(_pairs(one, other))


def share_difference(more: Share, less: Share) -> Estimate:
    """Return `more` minus `less`: over the prompts that were judged in both where they are paired (`is_paired`), with
    Newcombe's interval of pairs, else of two independent measures. ConfigError as `estimate_of`.
    """
    if not is_paired(more, less):
        return difference(estimate_of(more), estimate_of(less))
    pairs = _pairs(more, less)
    of_each = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
    return Estimate((of_each[1] - of_each[2]) / len(pairs), *paired(*of_each), len(pairs))


def _pairs(one: Share, other: Share) -> list[tuple[bool, bool]]:
    both = zip(one["outcomes"], other["outcomes"], strict=True)
    return [(left == "1", right == "1") for left, right in both if "u" not in (left, right)]
