"""What every gate gives, and what the gates share: verdicts on modules that no cosine decides, and on ranked ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...errors import ConfigError
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


def digits(value: float, limit: float) -> str:
    """Return four digits, or all of them where four would read as the limit itself."""
    short = f"{value:.4f}"
    return short if float(short) != round(limit, 4) else repr(value)


def check_count(num_layers: int, readings: Readings) -> None:
    """Raise ConfigError where there are fewer modules than `num_layers`."""
    if num_layers > len(readings):
        raise ConfigError(f"num_layers={num_layers} is more than the {len(readings)} LoRA modules there are: lower it")
