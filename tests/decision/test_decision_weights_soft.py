import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.decision import MergePlan, apply, measure
from safemerge_callback.decision.weights.soft import attenuated
from safemerge_callback.decision.weights.spread import spread
from safemerge_callback.errors import ConfigError
from safemerge_callback.live import writer_for

WEIGHTS = st.tuples(st.floats(0.05, 1.5), st.floats(0, 1.5))
UNIT = st.floats(0, 1)


@given(WEIGHTS, UNIT, st.floats(0.01, 1))
def test_weights_fade_in_below_the_limit(weights, cosine, limit):
    live, safety = attenuated(weights, cosine, limit)
    if cosine >= limit:
        assert (live, safety) == (1.0, 0.0)
        return
    share = 1 - cosine / limit
    assert safety == pytest.approx(share * weights[1])
    assert live == pytest.approx(1 + share * (weights[0] - 1))


@given(WEIGHTS, st.floats(0.01, 1), UNIT, UNIT)
def test_the_safety_weight_never_grows_with_the_cosine(weights, limit, one, other):
    low, high = sorted((one, other))
    assert attenuated(weights, low, limit)[1] >= attenuated(weights, high, limit)[1]


def test_both_ends_and_no_cliff():
    assert attenuated((0.8, 0.2), 0.0, 0.35) == (0.8, 0.2)
    assert attenuated((0.8, 0.2), 0.35, 0.35) == (1.0, 0.0)
    live, safety = attenuated((0.8, 0.2), math.nextafter(0.35, 0), 0.35)
    assert live == pytest.approx(1, abs=1e-12)
    assert safety == pytest.approx(0, abs=1e-12)
    assert attenuated((0.8, 0.2), 0.1, -math.inf) == (1.0, 0.0)


@given(WEIGHTS, st.integers(1, 40))
def test_events_together_leave_what_one_merge_would(weights, events):
    live, safety = spread(weights, events)
    task, guard = 1.0, 0.0
    for _ in range(events):
        task, guard = live * task, live * guard + safety
    assert (task, guard) == (pytest.approx(weights[0]), pytest.approx(weights[1]))


def test_spread_refuses_what_has_no_root():
    assert spread((0.8, 0.2), 1) == (0.8, 0.2)
    assert spread((1.0, 0.2), 4) == (1.0, 0.05)
    for weights, events in [((0.0, 0.2), 3), ((0.8, 0.2), 0)]:
        with pytest.raises(ConfigError, match="w_live must be above 0"):
            spread(weights, events)


def test_a_soft_plan_merges_each_module_by_its_own_weights(make_case, safety_for):
    """Full rank, so that nothing is truncated: the dense sum in float64, module by module."""
    case = make_case("llama", rank=32)
    safety, dense = safety_for(case)
    before, writer = case.updates(), writer_for(case.model)
    readings = measure(writer.gather(), case.subspace)
    tau = sorted(r.cosine for r in readings.values())[-3]
    plan = MergePlan.decide(readings, gate="threshold", threshold=tau, soft=True)
    assert len(plan.selected) == len(readings) - 3
    apply(plan, writer, safety)
    after, pairs = case.updates(), set()
    for name, update in before.items():
        live, guard = attenuated((0.8, 0.2), readings[name].cosine, tau)
        pairs.add((live, guard))
        torch.testing.assert_close(after[name], live * update + guard * dense[name], rtol=1e-5, atol=1e-6)
        assert plan.task_weight_of(name) == live
    assert len(pairs) == len(plan.selected) + 1
    assert "weights 0.8 / 0.2 (soft)" in str(plan).splitlines()[0]


@pytest.mark.parametrize("how", [{"method": "project"}, {"space": "factor"}, {"method": "slerp"}])
def test_soft_is_for_sums_of_updates(make_case, how):
    case = make_case("llama")
    readings = measure(writer_for(case.model).gather(), case.subspace)
    with pytest.raises(ConfigError, match="soft=True with method"):
        MergePlan.decide(readings, soft=True, **how)
