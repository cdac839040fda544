import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.decision import (
    MergePlan,
    Reading,
    Readings,
    Verdict,
    above,
    held_back,
    not_rearmed,
    under_floor,
    without,
)


def plan_of(cosines, **knobs):
    rows = {f"m{i}": cosine for i, cosine in enumerate(cosines)}
    readings = Readings(Reading(n, c, 0.7, 1.0, 4, (8, 8), null_std=0.1, reference=0.8) for n, c in rows.items())
    return MergePlan.decide(readings, **knobs)


def test_a_held_back_merge_says_why_and_the_others_stay():
    verdicts = {"a": Verdict(True, "low"), "b": Verdict(True, "low"), "c": Verdict(False, "high")}
    assert held_back(verdicts, {"a": "too soon", "c": "too soon"}) == {
        "a": Verdict(False, "low; too soon"),
        "b": Verdict(True, "low"),
        "c": Verdict(False, "high"),
    }
    plan = plan_of([0.1, 0.2, 0.9], threshold=0.35)
    assert without(plan, {}) is plan
    assert without(plan, {"m0": "no"}).selected == ("m1",)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(0, 1), st.floats(0.1, 1))
def test_no_module_is_pushed_under_the_floor(left, floor, live):
    plan = plan_of([0.1, 0.2, 0.9], weights=(live, 0.2))
    weights = {f"m{i}": w for i, w in enumerate(left)}
    kept = without(plan, under_floor(plan, weights, floor)).selected
    assert all(weights[name] * live >= floor - 2e-9 for name in kept)
    assert all(weights[name] * live < floor for name in set(plan.selected) - set(kept))


def test_the_floor_itself_may_be_reached_whatever_the_rounding():
    plan = plan_of([0.1], weights=(0.8, 0.2))
    assert under_floor(plan, {"m0": 0.64}, 0.512) == {}
    assert under_floor(plan, {"m0": 0.512}, 0.512) == {
        "m0": "held back: 0.4096 of the task's update would be left, under min_task_weight 0.512"
    }
    assert under_floor(plan, {}, 0.8) == under_floor(plan, {}, 0.0) == {}


def test_the_floor_counts_a_soft_merge_by_its_own_weight():
    plan = plan_of([0.34, 0.01], soft=True)
    assert list(under_floor(plan, {"m0": 0.9, "m1": 0.9}, 0.85)) == ["m1"]


@pytest.mark.parametrize(
    ("knobs", "seen"),
    [
        ({"gate": "threshold"}, {"m0", "m1", "m2", "m3"}),
        ({"gate": "threshold", "rearm": 0.0}, {"m2", "m3"}),
        ({"gate": "threshold", "rearm": 0.1}, {"m3"}),
        ({"gate": "threshold", "rearm": 0.6}, set()),
        ({"gate": "calibrated", "rearm": 0.0}, {"m3"}),
        ({"gate": "calibrated", "rearm": 1.5}, set()),
        ({"gate": "reference", "rearm": 0.0}, {"m2", "m3"}),
        ({"gate": "reference", "rearm": 0.1}, {"m3"}),
        ({"gate": "num_layers", "num_layers": 1, "rearm": 0.0}, {"m1", "m2", "m3"}),
        ({"gate": "quantile", "quantile": 0.5, "rearm": 0.0}, {"m2", "m3"}),
        ({"gate": "gap", "rearm": 0.0}, {"m2", "m3"}),
    ],
)
def test_above_is_the_knob_raised_by_the_margin(knobs, seen):
    assert above(plan_of([0.1, 0.2, 0.4, 0.6], **knobs)) == seen


def test_what_no_cosine_decides_is_never_seen_above():
    rows = [Reading("still", 1.0, 0.7, 0.0, 4, (8, 8)), Reading("broken", float("nan"), 0.7, 1.0, 4, (8, 8))]
    for gate in ({"gate": "threshold"}, {"gate": "num_layers", "num_layers": 1}):
        assert above(MergePlan.decide(Readings(rows), **gate, rearm=0.0)) == set()


def test_a_merged_module_waits_until_it_was_seen_above():
    plan = plan_of([0.1, 0.2, 0.9], rearm=0.1)
    assert not_rearmed(plan, ["m0", "m2"]) == {
        "m0": "not re-armed: not seen above the gate by 0.1 since its last merge"
    }
    assert not_rearmed(plan_of([0.1]), ["m0"]) == {}
