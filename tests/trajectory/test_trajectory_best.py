"""Whichever weights the user is left with were merged exactly once."""

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

SCALING = 2.0


class Best(TrainerCallback):
    """Make the checkpoint of `step` the best one."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_rank"] = float(state.global_step == self.step) - state.global_step / 1000


def train(world, runs, output, best, *more, **knobs):
    before, after = runs.Recorder(), runs.Recorder()
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": True}
    guard = world.guard(**knobs)
    trainer = world.trainer(output, Best(best), before, guard, after, *more, **settings, **chosen)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    return trainer, before, after


def expected_merge(world, runs, live):
    safety = runs.updates(runs.saved_weights(world.safety), 2.0)
    return runs.merged(runs.updates(live, SCALING), safety, rank=4)


def same(left, right):
    """Equal weights, one side named as in a model and the other as in a file."""
    plain = {name.replace(".default", ""): weight for name, weight in left.items()}
    assert plain.keys() == right.keys()
    return all(torch.equal(plain[name], weight) for name, weight in right.items())


def test_a_reloaded_best_that_was_never_merged_is_merged_once(world, runs, tmp_path):
    _, before, after = train(world, runs, tmp_path, best=2, every=0)
    assert same(before.steps[2], runs.saved_weights(tmp_path / "checkpoint-2"))
    expected = expected_merge(world, runs, before.steps[2])
    assert runs.distance(runs.updates(after.end, SCALING), expected) < 1e-5
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [6, 6]
    # the weights left hold one merge, whatever happened to those that were dropped
    assert {m["task_weight"] for m in runs.entries(tmp_path, "merge")[-1]["modules"]} == {0.8}


def test_a_reloaded_best_that_holds_its_steps_merge_is_left_alone(world, runs, tmp_path):
    _, _, after = train(world, runs, tmp_path, best=2, every=2)
    assert same(after.end, runs.saved_weights(tmp_path / "checkpoint-2"))
    assert same(after.steps[2], runs.saved_weights(tmp_path / "checkpoint-2"))
    last = runs.entries(tmp_path, "check")[-1]
    assert {m["reason"] for m in last["modules"]} == {"gate all; already merged at step 2"}


def test_a_reloaded_best_between_two_merges_is_merged_again(world, runs, tmp_path):
    _, _, after = train(world, runs, tmp_path, best=4, every=3)
    expected = expected_merge(world, runs, runs.saved_weights(tmp_path / "checkpoint-4"))
    assert runs.distance(runs.updates(after.end, SCALING), expected) < 1e-5
    assert [m["task_weight"] for m in runs.entries(tmp_path, "merge")[-1]["modules"]] == [pytest.approx(0.64)] * 4


def test_the_last_checkpoint_as_best_is_not_merged_twice(world, runs, tmp_path):
    _, _, after = train(world, runs, tmp_path, best=6, every=0)
    assert same(after.end, runs.saved_weights(tmp_path / "checkpoint-6"))
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [6]


def test_early_stopping_decides_after_our_hook_and_the_best_is_still_merged(world, runs, tmp_path):
    trainer, before, after = train(world, runs, tmp_path, 2, EarlyStoppingCallback(1), every=0)
    assert trainer.state.global_step == 4
    expected = expected_merge(world, runs, before.steps[2])
    assert runs.distance(runs.updates(after.end, SCALING), expected) < 1e-5
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [4]


def test_a_stop_that_nothing_announced_is_merged_at_the_end(world, runs, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    before, after = runs.Recorder(), runs.Recorder()
    trainer = world.trainer(tmp_path, before, world.guard(every=0), after, Stop())
    trainer.train()
    assert trainer.state.global_step == 3
    expected = expected_merge(world, runs, before.steps[3])
    assert runs.distance(runs.updates(after.end, SCALING), expected) < 1e-5


def test_without_a_final_check_the_end_is_left_alone(world, runs, tmp_path):
    _, _, after = train(world, runs, tmp_path, best=4, every=3, at_train_end=False)
    assert same(after.end, runs.saved_weights(tmp_path / "checkpoint-4"))


def test_a_reloaded_best_is_averaged_over_its_own_past(world, runs, tmp_path):
    """Not over the steps after it, whose weights were dropped."""
    knobs = {"method": "ema", "safety_adapter": None, "every": 0, "ema_every": 1, "ema_decay": 0.5}
    _, before, after = train(world, runs, tmp_path, best=2, **knobs)
    first, second = (runs.updates(before.steps[step], SCALING) for step in (1, 2))
    mean = {name: 0.25 * first[name] + 0.5 * second[name] for name in first}
    expected = runs.merged(mean, mean, rank=4, weights=(1.0, 0.0))
    assert runs.distance(runs.updates(after.end, SCALING), expected) < 1e-4
    assert [e["average"]["followed"] for e in runs.entries(tmp_path, "merge")] == [6, 2]
