import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.corrections.schedule import Schedule, cooling, due, final_due, interval, merge_events
from safemerge_callback.errors import ConfigError
from safemerge_callback.training.config.settings import SafeMergeConfig

STEPS = st.integers(0, 500)


@given(every=st.integers(1, 60), first=STEPS, length=STEPS)
def test_due_falls_on_the_multiples_within_the_bounds(every, first, length):
    last = first + length
    found = [s for s in range(0, last + 2 * every) if due(s, every=every, from_step=first, until_step=last)]
    assert found == [m for m in range(every, last + 1, every) if m >= first]


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 10**6))
def test_below_1_it_is_a_share_of_the_run_as_transformers_has_it(share, max_steps):
    from transformers import TrainerState, TrainingArguments

    state = TrainerState(max_steps=max_steps)
    state.compute_steps(TrainingArguments(save_steps=share, report_to="none", use_cpu=True), max_steps)
    assert interval(share, max_steps) == state.save_steps >= 1


# in a shorter run the steps are rounded more
@given(st.integers(150, 100_000))
def test_the_default_is_six_merges_whatever_the_runs_length(max_steps):
    steps = merge_events(max_steps, every=SafeMergeConfig.every)
    assert len(steps) == 6
    assert steps[-1] == max_steps
    # the last two are not next to each other
    assert steps[-1] - steps[-2] > 0.75 * (steps[1] - steps[0])


def test_from_1_on_it_is_steps():
    assert [interval(every, 60) for every in (0, 1, 50, 1000)] == [0, 1, 50, 1000]
    assert merge_events(60, every=0.2) == merge_events(60, every=12) == [12, 24, 36, 48, 60]


def test_due_never_at_step_zero_nor_with_every_zero():
    assert not any(due(s, every=0) for s in range(200))
    assert not due(0, every=1)
    assert due(1, every=1)


@pytest.mark.parametrize(
    ("step", "stopping", "final_step", "expected"),
    [
        (59, False, None, False),
        (60, False, None, True),
        (59, True, None, True),
        (60, True, 60, False),
        (61, True, 60, False),  # a finished run, resumed to the same end, takes one step too many
        (60, True, 30, True),  # stopped at 30, then went on
    ],
)
def test_final_due(step, stopping, final_step, expected):
    assert final_due(step, max_steps=60, stopping=stopping, final_step=final_step) is expected


def test_a_run_resumed_to_go_further_has_another_end():
    assert final_due(120, max_steps=120, stopping=True, final_step=60)


@given(last=STEPS, cooldown=st.integers(0, 50), passed=st.integers(-10, 100))
def test_cooling_covers_the_merged_step_and_the_cooldown_after_it(last, cooldown, passed):
    reason = cooling(last + passed, last_merge=last, cooldown=cooldown)
    assert (reason is not None) == (0 <= passed <= cooldown)


def test_cooling_says_why():
    assert cooling(10, last_merge=None, cooldown=5) is None
    assert cooling(10, last_merge=10, cooldown=0) == "already merged at step 10"
    assert cooling(12, last_merge=10, cooldown=5) == "cooldown: 2 of 5 steps since the merge at step 10"


@pytest.mark.parametrize(
    ("knobs", "steps"),
    [
        ({"every": 25}, [25, 50, 75, 100]),
        ({"every": 30}, [30, 60, 90, 100]),
        ({"every": 0}, [100]),
        ({"every": 30, "at_train_end": False}, [30, 60, 90]),
        ({"every": 25, "from_step": 40, "until_step": 80}, [50, 75, 100]),
        ({"every": 25, "cooldown": 30}, [25, 75]),
        ({"every": 25, "cooldown": 30, "at_train_end": False}, [25, 75]),
        ({"every": 25, "asynchronous": True}, [26, 51, 76, 100]),
        ({"every": 33, "asynchronous": True}, [34, 67, 100]),
        ({"every": 25, "asynchronous": True, "at_train_end": False}, [26, 51, 76, 100]),
        ({"every": 500, "at_train_end": False}, []),
    ],
)
def test_merge_events_are_the_steps_at_which_every_check_would_merge(knobs, steps):
    assert merge_events(100, **knobs) == steps


@given(every=st.integers(0, 20), first=STEPS, cooldown=st.integers(0, 30), last=st.integers(1, 120), end=st.booleans())
def test_merge_events_follow_due_and_cooling(every, first, cooldown, last, end):
    found = merge_events(last, every=every, from_step=first, cooldown=cooldown, at_train_end=end)
    expected, before = [], None
    for step in range(1, last + 1):
        wanted = due(step, every=every, from_step=first) or (end and step == last)
        if wanted and cooling(step, last_merge=before, cooldown=cooldown) is None:
            expected.append(step)
            before = step
    assert found == expected


def test_a_schedule_is_due_between_its_bounds_and_at_the_end():
    schedule = Schedule(every=0.25, from_step=4, until_step=8)
    assert [step for step in range(13) if schedule.due(step, 12, last=step == 12)] == [6]
    ends = Schedule(every=0, at_train_end=True)
    assert [step for step in range(13) if ends.due(step, 12, last=step == 12)] == [12]
    assert Schedule(every=3.0).every == 3


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"every": "2"}, "every is '2': give a whole number, or a share"),
        ({"every": -1}, "every is -1"),
        ({"from_step": 1.5}, "from_step is 1.5: give a whole number of 0 or more"),
        ({"until_step": True}, "until_step is True"),
        ({"at_train_end": "no"}, "at_train_end is 'no': give true or false"),
        ({"every": 0}, "it would never be due"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(knobs, says):
    with pytest.raises(ConfigError, match=says):
        Schedule(**knobs)
