"""What every gate gives, and what gates share: verdicts where no cosine decides, ranks, what intervals leave open."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ...errors import ConfigError, shown
from ...io.numbers import is_number
from ..reading import Reading, Readings


class Verdict(NamedTuple):
    """Whether to merge a module, and why, in words."""

    merge: bool
    reason: str


def not_finite(reading: Reading) -> Verdict | None:
    """Return the verdict on an update that holds NaN or infinities, else None."""
    return None if reading.finite else Verdict(False, "update is not finite (NaN or infinite)")


def excluded(reading: Reading) -> Verdict | None:
    """Return the verdict on a module that no cosine decides, else None."""
    if not reading.finite:
        return not_finite(reading)
    if not reading.comparable:
        return Verdict(False, "nothing to compare with: aligned and unaligned are equal here")
    return Verdict(False, "has not moved") if reading.update_norm == 0 else None


def by_cosine(readings: Readings) -> list[str]:
    """Return the modules that a cosine may decide, lowest cosine first, ties by name."""
    moved = (name for name, reading in readings.items() if excluded(reading) is None)
    return sorted(moved, key=lambda name: (readings[name].cosine, name))


def lowest(readings: Readings, count: int, words: Callable[[bool], str]) -> dict[str, Verdict]:
    """Merge the `count` modules of lowest cosine, ties by name; `words(chosen)` ends the reason."""
    order = by_cosine(readings)
    rank = {name: position for position, name in enumerate(order, 1)}

    def ranked(name: str) -> Verdict:
        chosen = rank[name] <= count
        return Verdict(chosen, f"number {rank[name]} of {len(order)} by cosine, {words(chosen)}")

    return {name: excluded(reading) or ranked(name) for name, reading in readings.items()}


def below(reading: Reading, limit: float) -> str:
    """Return `<` where the cosine is below `limit`, strictly and unrounded, else `>=`."""
    return "<" if reading.cosine < limit else ">="


def proof(reading: Reading) -> str:
    """Return how the decision is known, as the end of a reason; nothing for an exact reading."""
    if reading.interval:
        return f" (certified: {reading.proof})"
    return " (re-read)" if reading.reread else ""


def share_above_zero(name: str) -> Callable[[Any, Mapping[str, Any]], float]:
    """Return what checks a knob of this name that is a share of the modules, above 0 and up to 1."""

    def checked(value: Any, _beside: Mapping[str, Any]) -> float:
        if not is_number(value) or not 0 < value <= 1:
            raise ConfigError(f"{name} is {shown(value)}: give a share of the modules, above 0 and up to 1")
        return float(value)

    return checked


def signal_of(reading: Reading, gate: str, signal: str, noun: str) -> float:
    """Return what the live model said of a module; ConfigError, with the way out, where it was not asked."""
    if signal not in reading.signals:
        raise ConfigError(
            f"gate {gate!r} reads {signal!r} of each module, which the live model is asked for, and module "
            f"{reading.name!r} has none: use it in training, or give `Readings.with_signals` the {noun}"
        )
    return reading.signals[signal]


def digits(value: float, limit: float) -> str:
    """Return four digits, or all of them where four would read as the limit itself."""
    short = f"{value:.4f}"
    return short if float(short) != round(limit, 4) else repr(value)


def check_count(num_layers: int, readings: Readings) -> None:
    """Raise ConfigError where there are fewer modules than `num_layers`."""
    if num_layers > len(readings):
        raise ConfigError(f"num_layers={num_layers} is more than the {len(readings)} LoRA modules there are: lower it")


def movable(readings: Readings) -> dict[str, Reading]:
    """Return the readings that a cosine decides."""
    return {name: reading for name, reading in readings.items() if excluded(reading) is None}


def straddles(reading: Reading, limit: float, *, exactly: bool = False) -> bool:
    """Return whether `limit` lies in the interval. What begins at it does not: merged is below it, strictly.

    `exactly`: whether what lies wholly below is open, too, since the cosine itself counts there.
    """
    return reading.lower < limit and (exactly or limit <= reading.upper)


def unranked(moved: Mapping[str, Reading], count: int) -> list[str]:
    """Return the modules that may or may not be among the `count` of lowest cosine.

    One is among them if fewer than that many others can lie as low as it lies at most, and is not if that many must lie
    lower than it lies at least.
    """
    lowers, uppers = sorted(r.lower for r in moved.values()), sorted(r.upper for r in moved.values())
    return [
        name
        for name, r in moved.items()
        if bisect_right(lowers, r.upper) - 1 >= count and bisect_left(uppers, r.lower) < count
    ]
