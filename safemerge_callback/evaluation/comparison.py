"""Two evaluations beside each other: did the second refuse more, over-refuse less, keep the task and its language?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import starmap
from typing import Any, Literal, NamedTuple

from .difference import Estimate, counts, has_interval, is_paired, share_difference
from .figures_file import Evaluation
from .intervals import wilson
from .measure import Kind, Share, as_share, coherence
from .units import LOSS_UNIT, number

Effect = Literal["better", "worse", "unclear"]
Outcome = Literal["better", "worse", "mixed", "unclear", "not_measured"]
# What a process ends with: a comparison is no verdict, so that only one of nothing is a failure.
EXIT_CODES: dict[Outcome, int] = {"better": 0, "worse": 0, "mixed": 0, "unclear": 0, "not_measured": 4}
_ORDER: tuple[Kind, ...] = ("harm", "over_refusal", "task", "coherence")


class Contrast(NamedTuple):
    """One measure of both: `change` is second minus first, None where one of them has no interval.

    `paired`: prompt by prompt, of the `change.n` that were judged in both; else of two shares, or scores.
    """

    measure: str
    kind: Kind
    unit: str
    judge: str | None
    first: float
    second: float
    change: Estimate | None
    paired: bool
    effect: Effect


class Comparison(NamedTuple):
    """Every contrast, refusals first; measures that are not compared, with the reason; what else differs."""

    contrasts: tuple[Contrast, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def outcome(self) -> Outcome:
        """What the contrasts come to: mixed where one is better and another worse."""
        effects = {contrast.effect for contrast in self.contrasts}
        if not effects:
            return "not_measured"
        if {"better", "worse"} <= effects:
            return "mixed"
        return next((one for one in ("better", "worse") if one in effects), "unclear")

    @property
    def exit_code(self) -> int:
        """What the process ends with: `EXIT_CODES`."""
        return EXIT_CODES[self.outcome]


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Return how the figures of `second` differ from those of `first`, measure by measure.

    A measure is compared with that of the same name and judge: in pairs where both have an outcome a prompt of the same
    prompts, with Newcombe's interval of pairs (1998, method 10), else as two shares. It is better or worse where the
    whole 95 % interval says so; each interval is of its own measure, and not of all together. Prompts from elsewhere
    and verdicts of another judge are not compared. `coherence` is of the sets that both were asked.
    """
    twins: list[tuple[Share, Share]] = []
    left_out: list[tuple[str, str]] = []
    for one in _measures(first):
        twin, reason = _twin(one, first, second)
        if twin is None:
            left_out.append((one["measure"], reason))
        else:
            twins.append((one, twin))
    names = {one["measure"] for one in first.figures}
    left_out += [(one["measure"], "the first has none") for one in _measures(second) if one["measure"] not in names]
    contrasts = [*starmap(_contrast, twins), *_coherence(twins)]
    contrasts.sort(key=lambda contrast: _ORDER.index(contrast.kind))
    return Comparison(tuple(contrasts), tuple(left_out), tuple(_notes(first, second, twins)))


def _measures(evaluation: Evaluation) -> list[Share]:
    """What was measured, without the coherence that is worked out of it."""
    return [one for one in evaluation.figures if one["kind"] != "coherence"]


def _twin(one: Share, first: Evaluation, second: Evaluation) -> tuple[Share | None, str]:
    """The same measure of the second; None and why where there is none that can be compared."""
    same = [other for other in second.figures if other["measure"] == one["measure"]]
    if not same:
        return None, "the second has none"
    judges = [other for other in same if None in (other["judge"], one["judge"]) or other["judge"] == one["judge"]]
    if not judges:
        return None, f"judged by {one['judge']} and by {' and by '.join(str(other['judge']) for other in same)}"
    twin = judges[0]
    if one["value"] is None or twin["value"] is None or 0 in (one["n"], twin["n"]):
        return None, f"nothing was judged of the {'first' if one['value'] is None or one['n'] == 0 else 'second'}"
    if one["unit"] != twin["unit"]:
        return None, f"measured in {one['unit'] or 'plain numbers'} and in {twin['unit'] or 'plain numbers'}"
    places = [_place(evaluation.sources.get(_set_of(one), "")) for evaluation in (first, second)]
    if _other_prompts(one, twin) and all(places) and places[0] != places[1]:
        return None, f"other prompts: of {places[0]!r} and of {places[1]!r}"
    return twin, ""


def _set_of(share: Share) -> str:
    return share["measure"].rpartition("_")[0]


def _place(source: str) -> str:
    """Where prompts come from, without the release that they were read from, which need not change them."""
    return source.partition("; read from ")[0]


def _other_prompts(one: Share, other: Share) -> bool:
    return bool(one["prompts"]) and bool(other["prompts"]) and one["prompts"] != other["prompts"]


def _contrast(one: Share, twin: Share) -> Contrast:
    change = share_difference(twin, one) if has_interval(one) and has_interval(twin) else None
    low_is_good = one["kind"] == "over_refusal" or one["unit"] == LOSS_UNIT
    return Contrast(
        measure=one["measure"],
        kind=one["kind"],
        unit=one["unit"],
        judge=one["judge"] or twin["judge"],
        first=one["value"] or 0.0,
        second=twin["value"] or 0.0,
        change=change,
        paired=is_paired(one, twin),
        effect=_effect(change, low_is_good),
    )


def _effect(change: Estimate | None, low_is_good: bool) -> Effect:
    if change is None or change.low <= 0 <= change.high:
        return "unclear"
    return "better" if (change.high < 0) == low_is_good else "worse"


def _coherence(twins: Sequence[tuple[Share, Share]]) -> list[Contrast]:
    """How many responses are language, over the sets of both: one judge's figures of a set are enough."""
    by_set = {_set_of(one): (one, twin) for one, twin in reversed(twins) if one["kind"] in ("harm", "over_refusal")}
    if not by_set:
        return []
    sides = zip(*reversed(by_set.values()), strict=True)
    one, twin = (_language(list(side)) for side in sides)
    return [_contrast(one, twin)]


def _language(shares: Sequence[Share]) -> Share:
    if all(share["outcomes"] for share in shares):
        return coherence(shares)
    n = sum((share["n"] or 0) + share["unjudged"] for share in shares)
    incoherent = sum(share["incoherent"] for share in shares)
    low, high = wilson(n - incoherent, n)
    return as_share("coherence", "coherence", (n - incoherent) / n, n, low, high, incoherent=incoherent)


def _notes(first: Evaluation, second: Evaluation, twins: Sequence[tuple[Share, Share]]) -> Iterator[str]:
    """What else differs, so that a difference may not be the model's."""
    for key in sorted(first.manner.keys() & second.manner.keys()):
        left, right = first.manner[key], second.manner[key]
        if left != right:
            yield "the two have other chat templates" if key == "template" else f"{key} is {left} and {right}"
    for one, twin in twins:
        if _other_prompts(one, twin):
            yield f"{one['measure']}: the prompts differ, so shares are compared and not answers"
        elif counts(one) and counts(twin) and not is_paired(one, twin) and one["kind"] != "task":
            yield f"{one['measure']}: no outcome a prompt is there of both, so shares are compared"
        elif not has_interval(one) or not has_interval(twin):
            yield f"{one['measure']}: {number(one['value'] or 0.0)} and {number(twin['value'] or 0.0)} have no interval"


def comparison_document(comparison: Comparison, first: str, second: str) -> dict[str, Any]:
    """Return the comparison as JSON has it; docs/compare.md names the keys."""
    rows = [{**one._asdict(), "change": one.change and one.change._asdict()} for one in comparison.contrasts]
    lead = {"outcome": comparison.outcome, "exit_code": comparison.exit_code, "first": first, "second": second}
    left_out = [{"measure": measure, "reason": reason} for measure, reason in comparison.left_out]
    return {**lead, "contrasts": rows, "left_out": left_out, "notes": list(comparison.notes)}
