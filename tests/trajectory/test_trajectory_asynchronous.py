"""Asynchronous checks: watching is absence, a merge comes one step later, and a resume is the unbroken run."""

import shutil

import pytest
import torch
from transformers import TrainerCallback

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}


def told(entry):
    """A journal entry without what two equal runs may differ in: clocks."""
    return {k: v for k, v in entry.items() if k not in ("time", "seconds", "training_seconds")}


def states(trainer):
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {(i, k): v for i, state in optimizer.items() for k, v in state.items()}
    return dict(trainer.model.state_dict()), moments


def test_watching_equals_absence_bit_for_bit(world, runs, tmp_path):
    watching = world.guard(gate="watch", safety_adapter=None, every=1, asynchronous=True)
    trainers, seeds = {}, {}
    for name, callbacks in {"absent": [], "watched": [watching]}.items():
        torch.manual_seed(11)
        trainers[name] = world.trainer(tmp_path / name, *callbacks, model=world.model(lora_dropout=0.3))
        trainers[name].train()
        seeds[name] = torch.get_rng_state()
    for expected, found in zip(*(states(t) for t in trainers.values()), strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in trainers.values()]
    assert losses[0] == losses[1]
    assert torch.equal(seeds["absent"], seeds["watched"])
    checks = runs.entries(tmp_path / "watched", "check")
    assert [(e.get("measured_at"), e["step"]) for e in checks] == [*((n, n + 1) for n in range(1, 6)), (None, 6)]


def test_readings_are_those_of_the_synchronous_check(world, runs, tmp_path):
    """Watched both ways, the training is one and the same, so every module of every check must have the same bits."""
    for name, asynchronous in (("now", False), ("later", True)):
        guard = world.guard(gate="watch", safety_adapter=None, every=2, asynchronous=asynchronous)
        world.trainer(tmp_path / name, guard).train()
    now, later = (runs.entries(tmp_path / name, "check") for name in ("now", "later"))
    assert [e["modules"] for e in now] == [e["modules"] for e in later]
    assert [e["step"] for e in now] == [e.get("measured_at", e["step"]) for e in later]


def test_a_merge_is_made_one_step_later_on_the_weights_of_then(world, runs, tmp_path):
    before, after = runs.Recorder(), runs.Recorder()
    world.trainer(
        tmp_path, before, world.guard(every=3, asynchronous=True, at_train_end=False), after, max_steps=7
    ).train()
    changed = [n for n in before.steps if not same(before.steps[n], after.steps[n])]
    assert changed == [4, 7]
    safety = runs.updates(runs.saved_weights(world.safety), 2.0)
    for step in changed:
        expected = runs.merged(runs.updates(before.steps[step], 2.0), safety, rank=4)
        assert runs.distance(runs.updates(after.steps[step], 2.0), expected) < 1e-5
    merges = runs.entries(tmp_path, "merge")
    assert [e["step"] for e in merges] == changed


def same(left, right):
    return all(torch.equal(w, right[n]) for n, w in left.items())


@pytest.mark.parametrize("every", [2, 3])
def test_resumed_at_every_step_equals_unbroken(world, runs, tmp_path, every):
    """Saved at each step, those between a measurement and its merge too: from any of them on, nothing is otherwise."""
    knobs = {"every": every, "asynchronous": True, "cooldown": 1}
    whole = world.trainer(tmp_path / "whole", world.guard(**knobs), **SAVING)
    whole.train()
    expected = runs.lora_weights(whole.model)
    for step in range(1, 8):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(tmp_path / "whole" / "safemerge.jsonl", folder)
        state = runs.stored(folder / f"checkpoint-{step}")
        assert state["pending"] == (step if step % every == 0 else None)
        trainer = world.trainer(folder, world.guard(**knobs), **{**SAVING, "save_strategy": "no"})
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert same(expected, runs.lora_weights(trainer.model)), step
        here = [told(e) for e in runs.entries(folder) if (e["kind"], e["step"]) != ("start", step)]
        assert here == [told(e) for e in runs.entries(tmp_path / "whole")], step


def test_a_check_that_was_begun_is_finished_by_a_run_that_is_not_asynchronous(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(every=2, asynchronous=True), **{**SAVING, "max_steps": 2}).train()
    trainer = world.trainer(tmp_path, world.guard(every=4), **SAVING)
    # the checkpoint of step 1 lacks a pending check, that of step 2 was the end of a run: make one that has it
    runs.as_older(tmp_path / "checkpoint-1", pending=1)
    with pytest.warns(UserWarning, match="asynchronous True -> False"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    checks = [(e.get("measured_at"), e["step"]) for e in runs.entries(tmp_path, "check")]
    assert checks == [(1, 2), (None, 4), (None, 8)]


class Stop(TrainerCallback):
    """Stop the training after our callback's hook has passed, as early stopping does."""

    def on_log(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize("at_train_end", [True, False])
def test_a_run_that_is_stopped_with_a_check_under_way_records_it_and_merges_only_in_the_final_one(
    world, runs, tmp_path, at_train_end
):
    guard = world.guard(every=2, asynchronous=True, at_train_end=at_train_end)
    world.trainer(tmp_path, guard, Stop(), max_steps=8).train()
    checks = runs.entries(tmp_path, "check")
    expected = [(2, 3), (4, 4), (None, 4)] if at_train_end else [(2, 3), (4, 4)]
    assert [(e.get("measured_at"), e["step"]) for e in checks] == expected
    assert all("training ended" in m["reason"] and not m["merge"] for m in checks[1]["modules"])
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == ([3, 4] if at_train_end else [3])
    assert runs.entries(tmp_path, "end")[0]["checks"] == len(checks)


def test_the_last_step_is_never_left_to_a_step_that_does_not_come(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(every=3, asynchronous=True, at_train_end=False)).train()
    assert [(e.get("measured_at"), e["step"]) for e in runs.entries(tmp_path, "check")] == [(3, 4), (None, 6)]


def test_the_final_check_decides_on_the_last_weights_and_not_on_those_of_the_step_before(world, runs, tmp_path):
    before, after = runs.Recorder(), runs.Recorder()
    world.trainer(tmp_path, before, world.guard(every=5, asynchronous=True), after).train()
    late, final = runs.entries(tmp_path, "check")
    assert [(e.get("measured_at"), e["step"]) for e in (late, final)] == [(5, 6), (None, 6)]
    assert all("the final check at this step decides" in m["reason"] and not m["merge"] for m in late["modules"])
    assert all(m["merge"] for m in final["modules"])
    safety = runs.updates(runs.saved_weights(world.safety), 2.0)
    expected = runs.merged(runs.updates(before.steps[6], 2.0), safety, rank=4)
    assert runs.distance(runs.updates(after.steps[6], 2.0), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_on_a_gpu_every_placement_and_both_ways_give_the_same_bits_and_move_nothing(world, runs, tmp_path, placement):
    ends = []
    for name, knobs in {"absent": None, "now": {}, "later": {"asynchronous": True}}.items():
        watch = {"gate": "watch", "safety_adapter": None, "every": 2, "placement": placement}
        guards = [] if knobs is None else [world.guard(**watch, **knobs)]
        trainer = world.trainer(tmp_path / name, *guards, use_cpu=False)
        trainer.train()
        ends.append(runs.lora_weights(trainer.model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
    now, later = (runs.entries(tmp_path / name, "check") for name in ("now", "later"))
    assert [e["modules"] for e in now] == [e["modules"] for e in later]
    (start,) = runs.entries(tmp_path / "later", "start")
    assert start["placement"]["kind"] == placement
