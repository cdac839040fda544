"""Gate `gradient_norm`: which modules it takes, and what it says of each."""

import math

import pytest

from safemerge_callback.decision import Gate, MergePlan, Reading, Readings, as_gate
from safemerge_callback.errors import ConfigError

NORMS = {"a": 0.3, "b": 0.1, "c": 0.0, "d": 0.2}


def readings(norms, update=1.0):
    plain = Readings(Reading(name, 0.5, 0.5, update, 4, (8, 8)) for name in norms)
    return plain.with_signals({"gradient_norm": norms})


@pytest.mark.parametrize(("share", "chosen"), [(0.25, ["a"]), (0.5, ["a", "d"]), (1.0, ["a", "b", "d"])])
def test_it_takes_the_largest_gradients_and_none_without_one(share, chosen):
    verdicts = Gate("gradient_norm", knobs={"gradient_share": share}).verdicts(readings(NORMS))
    assert sorted(name for name, verdict in verdicts.items() if verdict.merge) == chosen
    assert verdicts["c"].reason == "safety gradient 0: nothing hangs on it"


def test_the_reason_says_rank_and_share():
    verdicts = Gate("gradient_norm").verdicts(readings(NORMS))
    assert verdicts["d"].reason == "safety gradient 0.2, number 2 of 3, among the largest 0.5 (2)"


def test_what_has_not_moved_or_is_broken_is_left_alone():
    gate = Gate("gradient_norm", knobs={"gradient_share": 1.0})
    assert not any(verdict.merge for verdict in gate.verdicts(readings({"a": 0.5}, update=0.0)).values())
    assert not any(verdict.merge for verdict in gate.verdicts(readings({"a": math.nan})).values())
    broken = Readings([Reading("a", math.nan, 0.5, math.nan, 4, (8, 8), signals={"gradient_norm": 1.0})])
    assert "not finite" in gate.verdicts(broken)["a"].reason


def test_it_asks_no_cosine_and_refuses_what_cannot_be():
    gate = Gate("gradient_norm")
    assert not gate.asks_cosines
    assert gate.needs == {"gradient_norm"}
    with pytest.raises(ConfigError, match="gradient_share is 0: give a share"):
        as_gate("gradient_norm", {"gradient_share": 0})
    with pytest.raises(ConfigError, match=r"reads 'gradient_norm' of each module.*use it in training"):
        MergePlan.decide(Readings([Reading("a", 0.5, 0.5, 1.0, 4, (8, 8))]), gate="gradient_norm")
