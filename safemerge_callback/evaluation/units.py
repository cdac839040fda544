"""The unit of a measure, and its value in words: percent for what is declared a share, any other number as it is."""

from __future__ import annotations

# A part of 1, shown in percent.
SHARE = "share"
LOSS_UNIT = "nats a token"
_COUNTED = ("harm", "over_refusal", "coherence")
_MOST_LETTERS = 40


def unit_of(measure: str, kind: str, declared: object = None) -> str:
    """Return the unit of a measure: as declared, else a share for what is counted of prompts, and none for a task.

    A task's score may lie in [0, 1] and be no share, or be one that is not declared: it is then a plain number.
    """
    if declared is not None:
        return str(declared)
    if kind in _COUNTED:
        return SHARE
    return LOSS_UNIT if measure == "eval_loss" else ""


def check_unit(unit: object) -> str:
    """Return a unit that can be shown; ValueError for one that is no text of one short line."""
    if not isinstance(unit, str) or len(unit) > _MOST_LETTERS or not unit.isprintable():
        raise ValueError(
            f"unit {unit!r} cannot be shown: give '{SHARE}' for a part of 1, else the unit as a text of one line and "
            f"at most {_MOST_LETTERS} letters, such as 'BLEU'"
        )
    return unit


def within_share(*values: float | None) -> bool:
    """Whether these can be shares: each lies in [0, 1], where it is known."""
    return all(value is None or value != value or 0 <= value <= 1 for value in values)


def number(value: float) -> str:
    """Return a number in six digits at most."""
    return f"{value:.6g}"


def amount(value: float, unit: str, percent: str = " %") -> str:
    """Return a value with its unit, as `71.9 %` or `36.5 BLEU`; what cannot be a share is never in percent."""
    if unit == SHARE:
        return f"{100 * value:.1f}{percent}" if within_share(value) else number(value)
    return f"{number(value)} {unit}".rstrip()


def interval(low: float, high: float, unit: str) -> str:
    """Return the ends of an interval, as `60 to 81` (percent, for a share) or `34.1 to 38.9`."""
    if unit == SHARE and within_share(low, high):
        return f"{100 * low:.0f} to {100 * high:.0f}"
    return f"{number(low)} to {number(high)}"
