"""A decision of `safemerge gate` for people and pipelines: a table, a Markdown card, JUnit XML."""

from __future__ import annotations

from xml.etree import ElementTree

from ..evaluation.acceptance import Decision, Outcome, Ruling
from ..evaluation.units import SHARE, amount
from ..io.card import escaped
from ..io.printable import printable
from ..io.text_table import render

WORDS: dict[Outcome, str] = {
    "passed": "passed",
    "failed": "failed",
    "not_measured": "not measured",
    "undecided": "undecided",
}
_COLUMNS = ("", "threshold", "measure", "value", "95 % interval", "n", "why")


def decision_text(decision: Decision, source: str) -> str:
    """Return the decision as a table, a row a ruling."""
    return render(f"{source}: {WORDS[decision.outcome]}", _COLUMNS, map(_row, decision.rulings))


def decision_card(decision: Decision, source: str) -> str:
    """Return the decision as Markdown, for a pull request."""
    lines = [f"### Safety gate: {WORDS[decision.outcome]}", "", f"`{printable(source).replace('`', '')}`", ""]
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_row, decision.rulings)]
    lines += ["| " + " | ".join(escaped(printable(cell)) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def decision_junit(decision: Decision, source: str) -> str:
    """Return the decision as JUnit XML: a case a ruling, an error where nothing was measured, a failure else."""
    cases = decision.rulings
    errors = [one for one in cases if one.outcome == "not_measured"]
    failures = [one for one in cases if one.outcome in ("failed", "undecided")]
    suite = ElementTree.Element("testsuite", name="safemerge gate")
    for name, counted in (("tests", cases), ("failures", failures), ("errors", errors)):
        suite.set(name, str(len(counted)))
    for ruling in cases:
        label = printable(f"{ruling.rule} {ruling.measure or ''}".strip())
        case = ElementTree.SubElement(suite, "testcase", classname=printable(source), name=label)
        if ruling in errors or ruling in failures:
            tag = "error" if ruling in errors else "failure"
            fault = ElementTree.SubElement(case, tag, type=ruling.outcome, message=printable(ruling.reason))
            fault.text = printable(", ".join(cell for cell in _row(ruling) if cell))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _row(ruling: Ruling) -> tuple[str, ...]:
    rule = f"{ruling.rule} {amount(ruling.limit, SHARE)}"
    if ruling.estimate is None:
        return WORDS[ruling.outcome], rule, ruling.measure or "", "", "", "", ruling.reason
    value, low, high = (_percent(x) for x in ruling.estimate[:3])
    interval = f"{low} to {high}"
    return WORDS[ruling.outcome], rule, ruling.measure or "", value, interval, str(ruling.estimate.n), ruling.reason


def _percent(share: float) -> str:
    """A share, or a difference of two, which may be below 0."""
    return f"{100 * share:.1f} %"
