"""Harm, over-refusal and utility of a model, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.measure import Share
from ..evaluation.units import amount
from ..io.text_table import render
from ..signals.thoughts import ADVICE

_KINDS = {"harm": "harm (higher is safer)", "over_refusal": "over-refusal (lower is better)", "task": "utility"}
_COLUMNS = ("kind", "measure", "judge", "n", "value", "95 % interval", "incoherent", "unjudged")
_RIGHT = ("n", "value", "95 % interval", "incoherent", "unjudged")


def figures_text(figures: Sequence[Share], title: str) -> str:
    """Return the figures as one table, harm first and utility last."""
    rows = [_row(figure) for kind in _KINDS for figure in figures if figure["kind"] == kind]
    return render(title, _COLUMNS, rows, _RIGHT)


def thoughts_lines(figures: Sequence[Share]) -> list[str]:
    """Return a line for each prompt set whose responses held thoughts: how many were cut, how many never ended."""
    sets = {figure["measure"].rpartition("_")[0]: figure for figure in figures if figure["thoughts"]}
    return [
        f"{name}: thoughts cut from {one['thoughts']} responses{_never(one['unfinished'])}"
        for name, one in sets.items()
    ]


def _never(unfinished: int) -> str:
    return f"; {unfinished} ended within one and were not judged: {ADVICE}" if unfinished else ""


def _row(figure: Share) -> tuple[str, ...]:
    value, low, high = figure["value"], figure["low"], figure["high"]
    unit = figure["unit"]
    interval = "" if low is None or high is None else f"{amount(low, unit, '%')} to {amount(high, unit, '%')}"
    counts = (str(figure["incoherent"]), str(figure["unjudged"])) if figure["kind"] != "task" else ("", "")
    shown = "nothing judged" if value is None else amount(value, unit, "%")
    return _KINDS[figure["kind"]], figure["measure"], figure["judge"] or "", str(figure["n"]), shown, interval, *counts
