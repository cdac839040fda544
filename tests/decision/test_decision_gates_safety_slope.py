"""Gate `safety_slope`: which modules it takes, and what it says of each."""

import math

import pytest

from safemerge_callback.decision import Gate, MergePlan, Reading, Readings, as_gate
from safemerge_callback.errors import ConfigError


def readings(slopes, task=None, norm=1.0):
    signals = {"safety_slope": slopes} if task is None else {"safety_slope": slopes, "task_slope": task}
    return Readings(Reading(name, 0.5, 0.5, norm, 4, (8, 8)) for name in slopes).with_signals(signals)


SLOPES = {"a": 0.3, "b": 0.1, "c": -0.2, "d": 0.2}


@pytest.mark.parametrize(
    ("share", "chosen"), [(0.25, ["a"]), (0.5, ["a", "d"]), (0.75, ["a", "b", "d"]), (1.0, ["a", "b", "d"])]
)
def test_it_takes_the_highest_slopes_and_none_that_costs_nothing(share, chosen):
    verdicts = Gate("safety_slope", knobs={"slope_share": share}).verdicts(readings(SLOPES))
    assert sorted(name for name, verdict in verdicts.items() if verdict.merge) == chosen
    assert verdicts["c"].reason == "safety slope -0.2: its update costs no refusals"


def test_the_reason_says_rank_and_share():
    verdicts = Gate("safety_slope").verdicts(readings(SLOPES))
    assert verdicts["d"].reason == "safety slope +0.2, number 2 of 3, among the highest 0.5 (2)"
    assert verdicts["b"].reason == "safety slope +0.1, number 3 of 3, not among the highest 0.5 (2)"


def test_per_task_slope_ranks_by_what_is_lost_for_what_is_gained():
    task = {"a": -0.3, "b": -0.05, "c": -0.1, "d": +0.1}
    gate = as_gate("safety_slope", {"slope_share": 0.5, "per_task_slope": True})
    assert gate.needs == {"safety_slope", "task_slope"}
    verdicts = gate.verdicts(readings(SLOPES, task))
    # d gains nothing, so its slope is divided by a hundredth of the largest
    assert [name for name, verdict in verdicts.items() if verdict.merge] == ["b", "d"]
    assert verdicts["d"].reason == "safety slope +0.2, 66.7 per task slope, number 1 of 3, among the highest 0.5 (2)"


def test_what_has_not_moved_or_is_broken_is_left_alone():
    slopes = {"a": 0.0, "b": math.nan}
    verdicts = Gate("safety_slope", knobs={"slope_share": 1.0}).verdicts(readings(slopes, norm=0.0))
    assert not any(verdict.merge for verdict in verdicts.values())
    broken = Readings([Reading("a", math.nan, 0.5, math.nan, 4, (8, 8), signals={"safety_slope": math.nan})])
    assert "not finite" in Gate("safety_slope").verdicts(broken)["a"].reason


def test_no_cosine_is_asked():
    gate = Gate("safety_slope")
    assert not gate.asks_cosines
    assert gate.needs == {"safety_slope"}


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"slope_share": 0}, "slope_share is 0: give a share"),
        ({"slope_share": "half"}, "slope_share is 'half'"),
        ({"per_task_slope": "yes"}, "per_task_slope is 'yes': give true or false"),
    ],
)
def test_knobs_that_cannot_be_are_refused(knobs, says):
    with pytest.raises(ConfigError, match=says):
        as_gate("safety_slope", knobs)


def test_readings_without_slopes_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"reads 'safety_slope' of each module.*use it in training"):
        MergePlan.decide(Readings([Reading("a", 0.5, 0.5, 1.0, 4, (8, 8))]), gate="safety_slope")
    with pytest.raises(ConfigError, match="reads 'task_slope' of each module"):
        MergePlan.decide(readings(SLOPES), gate="safety_slope", per_task_slope=True)


def test_signals_join_the_readings_of_their_modules():
    plain = Readings([Reading("a", 0.5, 0.5, 1.0, 4, (8, 8)), Reading("b", 0.5, 0.5, 1.0, 4, (8, 8))])
    joined = plain.with_signals({"safety_slope": {"a": 1.0, "b": 2.0}}).with_signals({"task_slope": {"a": 3.0}})
    assert joined["a"].signals == {"safety_slope": 1.0, "task_slope": 3.0}
    assert joined["b"].signals == {"safety_slope": 2.0}
    assert plain.with_signals({}) is plain
