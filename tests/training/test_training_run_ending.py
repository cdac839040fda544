"""What is left at the end: a snapshot to undo with, merged checkpoints, losses of the best model, the artifact."""

import warnings

import pytest
import torch
from transformers import TrainerCallback

from safemerge_callback import SafeMergeCallback, undo_merge
from safemerge_callback.adapters.snapshot import load_snapshot
from safemerge_callback.errors import ConfigError

SAVING = {"save_strategy": "steps", "save_steps": 2}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}


class Stop(TrainerCallback):
    """End the run after step `at`, without having told anyone before."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.at
        control.should_save = control.should_save or control.should_training_stop


def tensors(model):
    return {name.replace(".default", ""): p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(w, right[n]) for n, w in left.items())


def test_the_factors_before_the_final_merge_are_kept_and_undo_gives_them_back(world, runs, tmp_path):
    before = runs.Recorder()
    trainer = world.trainer(tmp_path, before, world.guard(every=0), **SAVING)
    trainer.train()
    trainer.save_model()
    merged = runs.saved_weights(tmp_path)
    snapshot = load_snapshot(tmp_path)
    assert snapshot.step == 6
    assert len(snapshot.factors) == 4
    assert len(undo_merge(tmp_path)) == 4
    plain = {n.replace(".default", ""): w for n, w in before.steps[6].items()}
    assert equal(runs.saved_weights(tmp_path), plain)
    assert equal(runs.saved_weights(tmp_path / "merged"), merged)
    assert [e["kind"] for e in runs.entries(tmp_path)] == ["start", "check", "merge", "end", "undo"]
    # the checkpoint has its own copy, and its own undoing
    assert equal(runs.saved_weights(tmp_path / "checkpoint-6"), merged)
    undo_merge(tmp_path / "checkpoint-6")
    assert equal(runs.saved_weights(tmp_path / "checkpoint-6"), plain)


def test_undo_refuses_what_it_cannot_undo(world, runs, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(every=0))
    trainer.train()
    trainer.save_model()
    undo_merge(tmp_path)
    undone = runs.saved_weights(tmp_path)
    with pytest.raises(ConfigError, match="undone already"):
        undo_merge(tmp_path)
    assert equal(runs.saved_weights(tmp_path), undone)
    with pytest.raises(ConfigError, match="holds no folder _pre_merge"):
        undo_merge(tmp_path / "merged" / "x" / "y")


def test_a_new_run_sets_the_snapshot_of_an_earlier_one_aside(world, tmp_path):
    world.trainer(tmp_path, world.guard(every=0)).train()
    first = load_snapshot(tmp_path)
    world.trainer(tmp_path, world.guard(gate="watch", every=0, safety_adapter=None)).train()
    assert not (tmp_path / "_pre_merge").exists()
    (tmp_path / "_pre_merge.1").rename(tmp_path / "_pre_merge")
    assert load_snapshot(tmp_path).norms == first.norms


def test_a_run_whose_end_merges_nothing_keeps_no_snapshot(world, tmp_path):
    world.trainer(tmp_path, world.guard(every=2, at_train_end=False)).train()
    assert not (tmp_path / "_pre_merge").exists()


def test_a_stop_that_nothing_announced_leaves_a_merged_checkpoint(world, runs, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(every=0), Stop(3), **SAVING)
    trainer.train()
    assert trainer.state.global_step == 3
    assert equal(runs.saved_weights(tmp_path / "checkpoint-3"), tensors(trainer.model))
    state = runs.stored(tmp_path / "checkpoint-3")
    assert (state["final_step"], state["merged_steps"]) == (3, [3])


def test_the_best_models_loss_before_and_after_its_merge(world, runs, tmp_path):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = world.trainer(tmp_path, Worse(), world.guard(every=0), **SAVING, **BEST)
    trainer.train()
    (best,) = runs.entries(tmp_path, "best")
    assert (best["checkpoint"], best["best_metric"]) == ("checkpoint-2", 2.0)
    with torch.no_grad():
        trainer.model.eval()
        batch = next(iter(trainer.get_eval_dataloader()))
        assert best["best_loss_after"] == pytest.approx(float(trainer.model(**batch).loss), rel=1e-5)
    assert best["best_loss_before"] != best["best_loss_after"]
    assert any("safemerge/best_loss_after" in entry for entry in trainer.state.log_history)


def test_two_callbacks_on_one_trainer_are_refused(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(), world.guard(every=3))
    with pytest.raises(ConfigError, match="two SafeMergeCallbacks"):
        trainer.train()


def test_one_callback_serves_one_trainer_after_another(world, tmp_path):
    guard, model = world.guard(every=0), world.model()
    world.trainer(tmp_path / "one", guard, model=model).train()
    world.trainer(tmp_path / "two", guard, model=model).train()
    world.trainer(tmp_path / "three", world.guard(every=0), model=model).train()
    assert (tmp_path / "three" / "safemerge.jsonl").exists()


def test_changed_settings_are_told_once_and_the_new_ones_hold(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(every=2), max_steps=4, **SAVING).train()
    trainer = world.trainer(tmp_path, world.guard(every=5, weights=[0.5, 0.5]), max_steps=8, **SAVING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    told = [str(w.message) for w in caught if "settings changed" in str(w.message)]
    assert len(told) == 1
    assert "every 2 -> 5" in told[0]
    assert "weights [0.8, 0.2] -> [0.5, 0.5]" in told[0]
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2, 4, 5, 8]
    assert runs.entries(tmp_path, "merge")[-1]["weights"] == [0.5, 0.5]


def test_a_smaller_batch_found_automatically_starts_the_counts_anew(world, runs, tmp_path):
    class Full(TrainerCallback):
        """Run out of memory once, in step 3, after a merge."""

        failed = False

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and not self.failed:
                Full.failed = True
                raise RuntimeError("CUDA out of memory.")

    trainer = world.trainer(tmp_path, world.guard(every=2), Full(), auto_find_batch_size=True)
    trainer.train()
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2, 4, 6]
    assert [e["step"] for e in runs.entries(tmp_path, "merge", "safemerge.1.jsonl")] == [2]
    last = runs.entries(tmp_path, "merge")[-1]["modules"]
    assert [m["task_weight"] for m in last] == [pytest.approx(0.8**3)] * 4


def test_a_crash_between_check_and_merge_resumes_equal(world, runs, tmp_path, monkeypatch):
    knobs = {"every": 2}
    whole = world.trainer(tmp_path / "whole", world.guard(**knobs), **SAVING)
    whole.train()

    def crash(*_):
        raise KeyboardInterrupt

    guard = world.guard(**knobs)
    broken = world.trainer(tmp_path / "parts", guard, **SAVING)
    broken.add_callback(Crash(4, guard, crash))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = world.trainer(tmp_path / "parts", world.guard(**knobs), **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert equal(tensors(resumed.model), tensors(whole.model))
    kinds = [(e["kind"], e["step"]) for e in runs.entries(tmp_path / "parts") if e["kind"] != "start"]
    assert kinds == [(e["kind"], e["step"]) for e in runs.entries(tmp_path / "whole") if e["kind"] != "start"]


class Crash(TrainerCallback):
    """Before step `at` ends, make the guard's writing crash."""

    def __init__(self, at, guard, crash):
        self.at, self.guard, self.crash = at, guard, crash

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at - 1:
            self.guard.session.writer.write = self.crash


def test_wandb_receives_the_merged_adapter_of_a_reloaded_best_model(world, runs, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    logged = []
    monkeypatch.setattr(
        wandb.Artifact, "add_dir", lambda self, folder, **_: logged.append((self.name, runs.saved_weights(folder)))
    )

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = world.trainer(
        tmp_path / "run", Worse(), world.guard(every=0), report_to="wandb", run_name="it", **SAVING, **BEST
    )
    trainer.train()
    wandb.finish()
    wandb.teardown()
    ((name, weights),) = logged
    assert name.startswith("model-it")
    assert equal(weights, tensors(trainer.model))


def test_the_setting_of_the_optimizers_state_is_checked_when_made(world):
    with pytest.raises(ConfigError, match="optimizer_state 'rest' is unknown"):
        SafeMergeCallback(**world.knobs(optimizer_state="rest"))
