"""Which decisions do readings with intervals leave open? The others are those of the exact measure, and proven."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Unpack

from .gates import Gate, Knobs, as_gate, excluded
from .gates.gap import FEWEST
from .gates.quantile import share_of
from .reading import Reading, Readings


def undecided(readings: Readings, gate: str | Gate, **knobs: Unpack[Knobs]) -> list[str]:
    """Return the modules that must be read exactly before `gate` may decide, in the order of the readings.

    Once these are exact, the gate's decision on every module is that of exact readings alone, and so is, with `rearm`,
    whether it lies that far above the gate, and, with `soft`, its weights. None are returned where the readings are
    exact, or where the gate asks no cosine (`all`, `watch`, `random` with `num_layers`). Raises ConfigError for knobs
    that the gate cannot use, and as the gate does for readings that lack what it needs.
    """
    rule = as_gate(gate, knobs)
    unproven = set(_unproven(rule, readings))
    return [name for name, reading in readings.items() if reading.interval and name in unproven]


def _unproven(rule: Gate, readings: Readings) -> Iterable[str]:
    if rule.name == "random" and rule.num_layers is None:
        # How many are drawn is how many that gate takes.
        return undecided(readings, Gate("threshold", threshold=rule.threshold))
    if rule.name == "opposed":
        # A compressed V gives no signed cosine.
        return _moved(readings)
    if rule.name == "num_layers":
        return _unranked(_moved(readings), rule.num_layers or 0)
    if rule.name == "quantile":
        moved = _moved(readings)
        return _unranked(moved, share_of(rule.quantile or 0.0, len(moved)))
    if rule.name == "gap":
        return _unparted(_moved(readings))
    return [name for name, reading in readings.items() if _straddles(rule, reading)]


def _straddles(rule: Gate, reading: Reading) -> bool:
    """Whether a limit of the rule lies in the interval. What begins at it does not: merged is below it, strictly."""
    limit = rule.limit(reading)
    if limit is None:
        return False
    if reading.lower < limit and (rule.soft or limit <= reading.upper):
        return True
    raised = rule.limit(reading, rule.rearm) if rule.rearm else None
    return raised is not None and reading.lower < raised <= reading.upper


def _moved(readings: Readings) -> dict[str, Reading]:
    return {name: reading for name, reading in readings.items() if excluded(reading) is None}


def _unranked(moved: dict[str, Reading], count: int) -> list[str]:
    """The modules that may or may not be among the `count` of lowest cosine.

    One is among them if fewer than that many others can lie as low as it lies at most, and is not if that many must lie
    lower than it lies at least.
    """
    lowers, uppers = sorted(r.lower for r in moved.values()), sorted(r.upper for r in moved.values())
    return [
        name
        for name, r in moved.items()
        if bisect_right(lowers, r.upper) - 1 >= count and bisect_left(uppers, r.lower) < count
    ]


def _unparted(moved: dict[str, Reading]) -> list[str]:
    """All modules, or none where the largest gap is where it is whatever the cosines are.

    The i-th lowest cosine lies between the i-th lowest lower end and the i-th lowest upper end, so the gap above it is
    at least one difference of those and at most another. Where one gap is at least more than any other is at most, it
    is the largest; and no interval reaches across it, since it is more than 0.
    """
    if len(moved) < FEWEST:
        return []
    lowers, uppers = sorted(r.lower for r in moved.values()), sorted(r.upper for r in moved.values())
    least = [low - high for low, high in zip(lowers[1:], uppers[:-1], strict=True)]
    most = [high - low for high, low in zip(uppers[1:], lowers[:-1], strict=True)]
    widest = max(range(len(least)), key=least.__getitem__)
    others = max(value for i, value in enumerate(most) if i != widest)
    return [] if least[widest] > max(others, 0.0) else list(moved)
