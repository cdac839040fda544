"""A comparison in words: the answer in a line, a table, and Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..evaluation.comparison import Comparison, Contrast, Outcome
from ..evaluation.units import SHARE, amount, number
from ..io.card import escaped
from ..io.printable import printable
from ..io.text_table import render

_ANSWERS: dict[Outcome, str] = {
    "better": "yes",
    "worse": "no, it did harm",
    "mixed": "yes and no",
    "unclear": "that cannot be told",
    "not_measured": "nothing was measured of both",
}
_CLOSING: dict[Outcome, list[str]] = {
    "better": ["nothing is seen to be worse"],
    "worse": ["nothing is seen to be better"],
    "unclear": ["each interval holds 0, or there is none: more prompts (--n) would tell more"],
}
_POINTS = " points"
_COLUMNS = ("", "measure", "judge", "first", "second", "change", "95 % interval", "n", "compared by")
_RIGHT = ("first", "second", "change", "95 % interval", "n")


def comparison_answer(comparison: Comparison) -> str:
    """Return in one line whether the second is better, by what, and what it cost."""
    parts = [f"did the second help? {_ANSWERS[comparison.outcome]}"]
    for effect in ("better", "worse"):
        contrasts = [one for one in comparison.contrasts if one.effect == effect]
        changes = [
            f"{one.measure} {_change(one)}{_POINTS if one.unit == SHARE else ''} ({_interval(one)})"
            for one in contrasts
        ]
        parts += [f"{effect}: {', '.join(changes)}"] if changes else []
    parts += _CLOSING.get(comparison.outcome, [])
    return "; ".join(parts)


def comparison_text(comparison: Comparison, first: str, second: str) -> str:
    """Return the answer, a table with a row a measure, and what is not compared or differs besides."""
    title = printable(f"first: {first}\nsecond: {second}", lines=True)
    lines = [printable(comparison_answer(comparison)), *title.splitlines()]
    if comparison.contrasts:
        table = render("", _COLUMNS, map(_row, comparison.contrasts), _RIGHT)
        lines.append(table.lstrip("\n"))
    return "\n".join([*lines, *map(printable, _remarks(comparison))])


def comparison_markdown(comparison: Comparison, first: str, second: str) -> str:
    """Return the same as Markdown."""
    names = [printable(name).replace("`", "") for name in (first, second)]
    lines = [
        f"### {escaped(printable(comparison_answer(comparison)))}",
        "",
        f"first `{names[0]}`, second `{names[1]}`",
        "",
    ]
    if comparison.contrasts:
        rows: list[Sequence[str]] = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_row, comparison.contrasts)]
        lines += ["| " + " | ".join(escaped(printable(cell)) for cell in row) + " |" for row in rows]
    lines += ["", *(f"- {escaped(printable(remark))}" for remark in _remarks(comparison))]
    return "\n".join(lines).rstrip()


def _remarks(comparison: Comparison) -> Iterator[str]:
    for measure, reason in comparison.left_out:
        yield f"{measure} is not compared: {reason}"
    yield from comparison.notes


def _row(one: Contrast) -> tuple[str, ...]:
    values = (amount(one.first, one.unit), amount(one.second, one.unit))
    n = str(one.change.n) if one.change and one.change.n else ""
    by = "prompts" if one.paired else "shares" if one.unit == SHARE else "scores"
    return one.effect, one.measure, one.judge or "", *values, _change(one), _interval(one), n, by


def _change(one: Contrast) -> str:
    return _signed(one.second - one.first if one.change is None else one.change.value, one.unit)


def _interval(one: Contrast) -> str:
    return "" if one.change is None else f"{_signed(one.change.low, one.unit)} to {_signed(one.change.high, one.unit)}"


def _signed(value: float, unit: str) -> str:
    """A difference: of shares in percentage points."""
    return f"{100 * value:+.1f}" if unit == SHARE else f"{'+' if value >= 0 else ''}{number(value)}"
