"""Focal diversity of failures, the set that it chooses, and the weights that follow."""

import itertools

import pytest
import torch

from safemerge_callback.decision import MergePlan, Reading, Readings
from safemerge_callback.decision.weights.focal import (
    choose_ensemble,
    failures_of,
    focal_diversity,
    vote_reward,
    vote_success,
)
from safemerge_callback.errors import ConfigError

READINGS = Readings(Reading(name, 0.3, 0.5, 1.0, 4, (8, 8)) for name in ("layers.0.q_proj", "layers.0.v_proj"))
OUTCOMES = ["110011", "110011", "001111"]


def failed(*rows):
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_identical_failures_are_0_and_disjoint_ones_1():
    assert focal_diversity(failed("xx..", "xx..", "xx..")) == 0.0
    assert focal_diversity(failed("x...", ".x..", "..x.")) == 1.0
    assert focal_diversity(failed("....", "....")) == 0.0
    assert focal_diversity(failed("x...")) == 0.0


def test_it_is_the_definition_and_does_not_see_the_order():
    """p(1) = Σ P(k fail)·k/M and p(2) = Σ P(k fail)·k(k - 1)/(M(M - 1)), where the focal member fails."""
    rows = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.4
    terms = []
    for member in rows:
        counts = rows[:, member].sum(0).tolist()
        share = {k: counts.count(k) / len(counts) for k in range(5)}
        first = sum(p * k / 4 for k, p in share.items())
        second = sum(p * k * (k - 1) / 12 for k, p in share.items())
        terms.append(1 - second / first)
    value = focal_diversity(rows)
    assert value == pytest.approx(sum(terms) / 4, abs=1e-12)
    for order in itertools.permutations(range(4)):
        assert focal_diversity(rows[list(order)]) == pytest.approx(value, abs=1e-12)
    # One that never fails is no focal member.
    assert focal_diversity(failed("x...", ".x..", "....")) == 1.0


def test_independent_failures_lie_between():
    """Of M that fail alone with probability q: k - 1 others are Binomial(M - 1, q), so 1 - p2/p1 is known."""
    M, q = 3, 0.3
    rows = torch.rand(M, 200_000, generator=torch.Generator().manual_seed(2)) < q
    mean = 1 + (M - 1) * q
    square = (M - 1) * q * (1 - q) + mean**2
    assert focal_diversity(rows) == pytest.approx(1 - (square - mean) / (mean * (M - 1)), abs=0.01)


def test_the_vote_and_its_reward():
    rows = failed("x...", "xx..", "....")
    assert vote_success(rows) == 0.75
    assert vote_success(rows[:2]) == 0.625  # the tie is half of a success
    assert vote_reward(rows, of=3) == pytest.approx(0.75 - 0.25 * 2)
    assert vote_reward(rows[:1], of=3) == pytest.approx(0.75 - 0.25 * (1 + 1 / 3))
    assert vote_reward(failed("...."), of=4) == 1.0


def test_the_set_of_the_best_score_is_chosen():
    failures = failures_of(OUTCOMES)
    assert choose_ensemble(failures, 2, 1.0).members == (0, 2)
    assert choose_ensemble(failures, 2, 1.0).diversity == 1.0
    # Where only the vote counts, diverse and poor ones have no advantage.
    poor = failures_of(["111110", "111110", "000001"])
    assert choose_ensemble(poor, 2, 0.0).members == (0, 1)
    assert choose_ensemble(poor, 2, 1.0).members == (0, 2)


def test_what_is_unjudged_of_anyone_is_left_out_and_what_is_incoherent_failed():
    assert torch.equal(failures_of(["1u0", "i11"]), torch.tensor([[False, True], [True, False]]))


def planned(**knobs):
    settings = {"method": "linear", "weights": [0.8, 0.1, 0.05, 0.05], "gate": "all"} | knobs
    return MergePlan.decide(READINGS, **settings)


def test_those_that_are_left_out_weigh_nothing_and_the_sum_stays():
    plan = planned(focal={"outcomes": OUTCOMES, "diversity_share": 1.0})
    for weights in plan.weights.values():
        assert weights == pytest.approx((0.8, 0.125, 0.0, 0.075))
    assert plan.noted["focal"] == {"outcomes": OUTCOMES, "count": 2, "diversity_share": 1.0}
    assert "2 of 3 safety adapters by focal diversity" in plan.words
    patterned = planned(focal=OUTCOMES, module_weights={"v_proj": [0.5, 0.3, 0.1, 0.1]})
    assert patterned.weights["layers.0.v_proj"][0] == 0.5
    assert patterned.weights["layers.0.v_proj"].count(0.0) == 1


@pytest.mark.parametrize(
    ("says", "knobs"),
    [
        ("outcomes of 2 safety adapters, and 3 are merged", {"focal": ["10", "01"]}),
        ("outcomes of 1 safety adapters, and 1 are merged", {"focal": ["10"], "weights": [0.8, 0.2]}),
        ("hold 'x': give a text with 1", {"focal": ["10", "01", "1x"]}),
        ("hold 101: give a text with 1", {"focal": [101, "01", "11"]}),
        (r"are of \[2, 2, 3\] prompts", {"focal": ["10", "01", "111"]}),
        ("no prompt that was judged", {"focal": ["1u", "u1", "11"]}),
        ("focal count is 4", {"focal": {"outcomes": OUTCOMES, "count": 4}}),
        ("diversity_share is 2", {"focal": {"outcomes": OUTCOMES, "diversity_share": 2}}),
        ("no setting 'counts'", {"focal": {"outcomes": OUTCOMES, "counts": 2}}),
        ("focal is '101'", {"focal": "101"}),
        ("focal with method 'ties'", {"focal": OUTCOMES, "method": "ties", "density": 0.5}),
    ],
)
def test_what_cannot_be_is_refused(says, knobs):
    with pytest.raises(ConfigError, match=says):
        planned(**knobs)
