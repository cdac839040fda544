"""What a run plans and leaves, against the schedule and the weights multiplied out, and against runs."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.decision import Verdict, share_left, under_floor
from safemerge_callback.training.config.settings import SafeMergeConfig
from safemerge_callback.training.run.forecast import Forecast, forecast, percent, too_strong

NAMES = ["layers.0.q_proj", "layers.0.v_proj"]


def settings(**changed):
    return SafeMergeConfig.from_dict({"subspace": "s", "safety_adapter": "a", **changed})


def planned(max_steps, **changed):
    return forecast(settings(**changed), NAMES, max_steps)


@pytest.mark.parametrize(
    ("max_steps", "changed", "merges", "left", "exact"),
    [
        (2800, {"every": 50, "threshold": 0.35}, 56, 0.8**56, False),
        (350, {"every": 50, "threshold": 0.35}, 7, 0.8**7, False),
        (2800, {}, 6, 0.8**6, True),
        (2800, {"every": 0}, 1, 0.8, True),
        (400, {"every": 40, "safety_adapter": None}, 10, 0.8**10, True),
        (400, {"every": 40, "safety_adapter": None, "strength": 0.1}, 10, 0.9**10, True),
        # spread weights are one merge's, whatever the schedule
        (2800, {"every": 50, "spread_weights": True}, 56, 0.8, True),
        (2800, {"every": 50, "min_task_weight": 0.5}, 56, 0.8**3, True),
        # the module that keeps the least
        (600, {"every": 100, "module_weights": {"v_proj": [0.5, 0.5]}}, 6, 0.5**6, True),
        (600, {"every": 100, "cooldown": 100}, 3, 0.8**3, True),
        (600, {"every": 100, "at_train_end": False, "until_step": 300}, 3, 0.8**3, True),
        (600, {"every": 100, "soft": True, "gate": "threshold"}, 6, 0.8**6, False),
        (600, {"every": 100, "gate": "quantile", "quantile": 0.5}, 6, 0.8**6, False),
    ],
)
def test_what_is_planned_is_multiplied_out(max_steps, changed, merges, left, exact):
    found = planned(max_steps, **changed)
    assert (found.merges, found.exact) == (merges, exact)
    assert math.isclose(found.left, left, rel_tol=1e-9)


def test_what_takes_nothing_away_leaves_no_share_and_watching_plans_nothing():
    assert planned(600, method="ema", safety_adapter=None) == Forecast(6, None, True)
    assert planned(600, method="project", operator="orthogonal", safety_adapter=None) == Forecast(6, None, True)
    assert planned(600, gate="watch") == Forecast(0, None, True)


def test_a_resumed_run_plans_what_is_still_to_come():
    found = forecast(settings(every=100), NAMES, 600, 250, {NAMES[0]: 0.64, NAMES[1]: 1.0})
    assert found.merges == 4
    assert math.isclose(found.left, 0.64 * 0.8**4)


@given(w=st.floats(0.05, 1.0), n=st.integers(0, 40), floor=st.floats(0, 1))
def test_the_share_left_is_what_the_floor_lets_a_run_merge(w, n, floor):
    """Merge as a run does: every event asks `under_floor`."""

    class Plan:
        selected = ("m",)

        def task_weight_of(self, name):
            return w

    left = 1.0
    for _ in range(n):
        left *= 1.0 if under_floor(Plan(), {"m": left}, floor) else w
    assert math.isclose(share_left(w, n, floor), left)
    assert Verdict(True, "").merge


@pytest.mark.parametrize(
    ("max_steps", "changed", "says"),
    [
        (
            2800,
            {"every": 50, "threshold": 0.35},
            r"up to 56 merges in 2,800 steps \(every=50\) leave as little as 0\.00037%",
        ),
        (2800, {"every": 50, "safety_adapter": None}, r"^56 merges .* leave 0\.00037% of what the task trains"),
        (600, {"weights": [0.7, 0.3]}, r"6 merges in 600 steps \(every=0\.167\) leave 12%"),
        (600, {"module_weights": {"v_proj": [0.5, 0.5]}}, r"leave 1\.6%"),
    ],
)
def test_less_than_a_fifth_is_warned_of(max_steps, changed, says):
    words = too_strong(settings(**changed), planned(max_steps, **changed), max_steps)
    assert words
    assert re.search(says, words), words
    assert "spread_weights=true" in words


@pytest.mark.parametrize(
    ("max_steps", "changed"),
    [
        (2800, {}),
        (350, {"every": 50}),
        (2800, {"every": 50, "min_task_weight": 0.3}),
        (2800, {"every": 50, "spread_weights": True, "weights": [0.1, 0.9]}),
        (2800, {"every": 0, "weights": [0.1, 0.9]}),
        (2800, {"every": 10, "gate": "watch"}),
        (2800, {"every": 10, "method": "ema", "safety_adapter": None}),
    ],
)
def test_what_was_asked_for_or_held_above_is_not(max_steps, changed):
    assert too_strong(settings(**changed), planned(max_steps, **changed), max_steps) is None


def test_a_share_has_two_digits_where_it_is_small():
    assert [percent(x) for x in (1.0, 0.262144, 0.0374, 0.8**56)] == ["100%", "26%", "3.7%", "0.00037%"]


@pytest.mark.parametrize(
    ("changed", "max_steps"),
    [
        ({"every": 2}, 6),
        ({"every": 1, "cooldown": 1}, 6),
        ({"every": 2, "safety_adapter": None}, 7),
        ({"every": 1, "min_task_weight": 0.5}, 6),
    ],
)
def test_runs_leave_what_was_forecast(world, runs, tmp_path, changed, max_steps):
    guard = world.guard(**changed)
    world.trainer(tmp_path, guard, max_steps=max_steps).train()
    start = next(e for e in runs.entries(tmp_path, "start"))
    merges = runs.entries(tmp_path, "merge")
    left = {m["name"]: m["task_weight"] for e in merges for m in e["modules"]}
    assert start["planned"]["exact"] is True
    assert math.isclose(min(left.values()), start["planned"]["left"])
    if "min_task_weight" not in changed:
        assert len(merges) == start["planned"]["merges"]


def test_a_run_that_leaves_little_warns_once_before_its_first_step(world, runs, tmp_path):
    with pytest.warns(UserWarning, match=r"6 merges in 6 steps \(every=1\) leave 1\.6%") as told:
        world.trainer(tmp_path, world.guard(every=1, weights=[0.5, 0.5])).train()
    assert sum("merges in" in str(one.message) for one in told) == 1
