"""What a check decides, from readings and progress alone; then the same in runs of the real trainer."""

import itertools
import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.decision import Reading, Readings
from safemerge_callback.errors import ConfigError, SubspaceError
from safemerge_callback.live.faults import Fault
from safemerge_callback.record.progress import Progress
from safemerge_callback.training.config.settings import SafeMergeConfig
from safemerge_callback.training.run.decide import (
    CheckMoment,
    agreed_plan,
    choices_of,
    decided,
    events_of,
    still_disarmed,
)


def config(**knobs):
    return SafeMergeConfig("s", "a", **{"gate": "threshold", "every": 10, **knobs})


def readings(*cosines):
    return Readings(Reading(f"m{i}", c, 0.7, 1.0, 4, (8, 8), null_std=0.1) for i, c in enumerate(cosines))


def decide(settings, progress, step, *cosines, hold=None, max_steps=100):
    """One check as a session makes it: decide, let those seen above go, merge."""
    moment = CheckMoment(step, step, max_steps, hold=hold)
    decision = decided(readings(*cosines), settings, progress, moment)
    plan = agreed_plan(decision, settings, moment)
    progress.disarmed = still_disarmed(progress.disarmed, decision.seen)
    if plan.selected:
        progress.record_merge(step, {name: plan.task_weight_of(name) for name in plan.selected})
    return plan


def test_a_fault_stays_one():
    fault = Fault("measure", "broken")
    assert decided(fault, config(), Progress(), CheckMoment(1, 1, 2)) is fault


def test_a_merged_module_is_merged_again_only_once_it_was_seen_above():
    settings, progress = config(rearm=0.05), Progress()
    chosen = [
        decide(settings, progress, 10 * (i + 1), cosine).selected
        for i, cosine in enumerate([0.3, 0.3, 0.38, 0.3, 0.41, 0.3, 0.3])
    ]
    # 0.38 is above the gate, but not by 0.05.
    assert chosen == [("m0",), (), (), (), (), ("m0",), ()]
    assert progress.merged_steps == [10, 60]
    last = decide(settings, progress, 80, 0.3)
    assert last.verdicts["m0"].reason.endswith("; not re-armed: not seen above the gate by 0.05 since its last merge")


def test_each_module_waits_for_itself():
    settings, progress = config(rearm=0.0), Progress()
    assert decide(settings, progress, 10, 0.3, 0.9).selected == ("m0",)
    assert decide(settings, progress, 20, 0.3, 0.3).selected == ("m1",)
    assert decide(settings, progress, 30, 0.4, 0.3).selected == ()
    assert decide(settings, progress, 40, 0.3, 0.4).selected == ("m0",)
    assert progress.disarmed == ["m0"]


def test_what_is_seen_during_a_cooldown_counts():
    settings, progress = config(rearm=0.0, cooldown=15), Progress()
    assert decide(settings, progress, 10, 0.3).selected == ("m0",)
    decide(settings, progress, 20, 0.9)
    assert progress.disarmed == []
    assert decide(settings, progress, 30, 0.3).selected == ("m0",)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=1, max_size=12),
    st.sampled_from([None, 0.0, 0.1]),
    # a floor above the weight of one merge is refused
    st.floats(0, 0.8),
    st.integers(0, 12),
)
def test_a_resume_at_any_check_decides_as_the_unbroken_run(cosines, rearm, floor, cut):
    settings = config(rearm=rearm, min_task_weight=floor, cooldown=5)
    ended = []
    for broken in (False, True):
        progress, chosen = Progress(), []
        for i, row in enumerate(cosines):
            if broken and i == cut:
                progress = Progress.of(json.loads(json.dumps(asdict(progress))))
            chosen.append(decide(settings, progress, 10 * (i + 1), *row).selected)
        ended.append((chosen, progress.task_weights, progress.disarmed))
        assert all(weight >= floor - 1e-6 for weight in progress.task_weights.values())
    assert ended[0] == ended[1]


def test_the_floor_holds_back_the_merge_that_would_pass_it():
    settings, progress = config(min_task_weight=0.6), Progress()
    chosen = [decide(settings, progress, 10 * i, 0.1).selected for i in range(1, 5)]
    assert chosen == [("m0",), ("m0",), (), ()]
    assert progress.task_weights == {"m0": pytest.approx(0.64)}
    reason = decide(settings, progress, 60, 0.1).verdicts["m0"].reason
    assert reason == "cosine 0.1000 < 0.35; held back: 0.5120 of the task's update would be left, under " + (
        "min_task_weight 0.6"
    )


def test_random_draws_anew_at_each_step_and_the_same_at_the_same():
    settings = config(gate="random", num_layers=1, seed=3)
    drawn = [decide(settings, Progress(), step, *[0.5] * 8).selected for step in (10, 10, 20, 30, 40)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_spread_weights_leave_the_asked_total_whatever_every_is():
    for every, cooldown in itertools.product((5, 10, 30, 50), (0, 20)):
        settings = config(every=every, cooldown=cooldown, spread_weights=True)
        progress = Progress()
        for step in range(every, 101, every):
            decide(settings, progress, step, 0.1)
        if 100 % every:
            decide(settings, progress, 100, 0.1)
        assert progress.merges == events_of(settings, 100)
        assert progress.task_weights == {"m0": pytest.approx(0.8)}
    assert choices_of(config(), 10, 100).how.weights == (0.8, 0.2)
    assert choices_of(config(spread_weights=True), 10, 100).how.weights[0] == pytest.approx(0.8 ** (1 / 10))


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"gate": "calibrated", "z_threshold": 30}, "z "),
        ({"gate": "reference", "reference_fraction": 1.0}, "of the safety adapter's"),
        ({"gate": "quantile", "quantile": 0.5}, "the lowest 0.5 (2)"),
        ({"gate": "gap"}, "the largest gap"),
        ({"gate": "random", "num_layers": 2}, "2 of 4 by lot"),
    ],
)
def test_each_gate_runs_and_its_reasons_are_in_the_journal(world, runs, tmp_path, knobs, says):
    world.trainer(tmp_path, world.guard(**knobs)).train()
    checks = runs.entries(tmp_path, "check")
    assert [e["step"] for e in checks] == [2, 4, 6]
    for entry in checks:
        assert entry["gate"] == knobs["gate"]
        assert all(says in m["reason"] for m in entry["modules"])
        assert {m["name"] for m in entry["modules"] if m["merge"]} == {
            m["name"] for e in runs.entries(tmp_path, "merge") if e["step"] == entry["step"] for m in e["modules"]
        }
    own = {"calibrated": "null_std", "reference": "reference"}.get(knobs["gate"])
    assert own is None or all(m[own] > 0 for e in checks for m in e["modules"])


def test_rearming_and_the_floor_survive_a_resume(world, runs, tmp_path):
    """Gate quantile with every module: none is ever seen above it, so that each is merged once."""
    knobs = {"gate": "quantile", "quantile": 1.0, "rearm": 0.0, "spread_weights": True}
    whole = world.trainer(tmp_path / "whole", world.guard(**knobs))
    whole.train()
    halves = tmp_path / "halves"
    world.trainer(halves, world.guard(**knobs), save_strategy="steps", save_steps=3).train()
    again = world.trainer(halves, world.guard(**knobs), save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=str(halves / "checkpoint-3"))
    for folder in (tmp_path / "whole", halves):
        assert [e["step"] for e in runs.entries(folder, "merge")] == [2]
        late = [m["reason"] for e in runs.entries(folder, "check")[1:] for m in e["modules"]]
        assert all("not re-armed" in reason for reason in late)
    assert runs.lora_weights(whole.model).keys() == runs.lora_weights(again.model).keys()
    for name, weight in runs.lora_weights(whole.model).items():
        assert weight.equal(runs.lora_weights(again.model)[name])


def test_spread_weights_in_a_run_leave_the_asked_share(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(spread_weights=True)).train()
    merges = runs.entries(tmp_path, "merge")
    assert len(merges) == 3
    assert all(e["weights"][0] == pytest.approx(0.8 ** (1 / 3)) for e in merges)
    assert all(m["task_weight"] == pytest.approx(0.8) for m in merges[-1]["modules"])


def test_soft_weights_are_each_modules_own_and_in_the_journal(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(gate="threshold", threshold=1.0, soft=True)).train()
    (first, *_), (check, *_) = runs.entries(tmp_path, "merge"), runs.entries(tmp_path, "check")
    cosines = {m["name"]: m["cosine"] for m in check["modules"]}
    for module in first["modules"]:
        share = 1 - cosines[module["name"]]
        assert module["weights"] == pytest.approx([1 - 0.2 * share, 0.2 * share])
        assert module["task_weight"] == module["weights"][0]


def test_a_subspace_without_spreads_is_refused_before_the_first_step(world, runs, tmp_path, monkeypatch):
    from safemerge_callback.subspace import Subspace

    monkeypatch.setattr(Subspace, "null_std", lambda *_: None)
    with pytest.raises(SubspaceError, match=r"gate 'calibrated' needs the spread.*build the subspace again"):
        world.trainer(tmp_path, world.guard(gate="calibrated")).train()


def test_more_drawn_than_there_are_is_refused_before_the_first_step(world, tmp_path):
    with pytest.raises(ConfigError, match="num_layers=99 is more than the 4"):
        world.trainer(tmp_path, world.guard(gate="random", num_layers=99)).train()


@pytest.mark.parametrize(
    ("knobs", "given"),
    [
        ({"every": 7}, "every=7"),
        ({"every": 2, "from_step": 7}, "every=2, from_step=7"),
        ({"every": 4, "until_step": 3}, "every=4, until_step=3"),
    ],
)
def test_a_schedule_of_which_nothing_falls_into_the_run_is_told_or_refused(world, runs, tmp_path, knobs, given):
    words = rf"no periodic check falls into this run of 6 steps \({given}\)"
    with pytest.warns(UserWarning, match=f"{words}: only the one at the end happens"):
        world.trainer(tmp_path / "end", world.guard(**knobs)).train()
    assert [e["step"] for e in runs.entries(tmp_path / "end", "merge")] == [6]
    seen = runs.Recorder()
    with pytest.raises(ConfigError, match=f"{words}, and at_train_end is false, so none would ever happen"):
        world.trainer(tmp_path / "none", world.guard(at_train_end=False, **knobs), seen).train()
    assert seen.steps == {}


def test_an_average_that_takes_nothing_in_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="ema_every is 7 and the run has 6 steps, so the average would never take"):
        world.trainer(tmp_path, world.guard(method="ema", safety_adapter=None, ema_every=7)).train()
