"""A tracker that fails costs its own numbers, once told of, and nothing else."""

import json
import resource
import tempfile
import warnings
from pathlib import Path

import pytest
from transformers import TrainerCallback

from safemerge_callback.training import LoopLog
from tests.support.ranks import run_on


class At(TrainerCallback):
    """Do something to a tracker before step `at` begins."""

    def __init__(self, at, act):
        self.at, self.act = at, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at - 1:
            self.act()


def without_its_own(trainer, name):
    """Take the trainer's own callback of a tracker away: the user logs to it, and so do we."""
    from transformers.integrations import integration_utils

    trainer.remove_callback(getattr(integration_utils, name))
    return trainer


def ours(caught):
    return [str(w.message) for w in caught if str(w.message).startswith("safemerge")]


def trained(trainer, runs, output, **expected):
    """Train to the end; the run has lost no step, no merge and no number of the log history."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert trainer.state.global_step == 6
    assert [e["step"] for e in runs.entries(output, "merge")] == [2, 4, 6]
    assert len([e for e in trainer.state.log_history if "safemerge/modules" in e]) == 3
    assert runs.entries(output)[-1]["kind"] in ("end", "error")
    return ours(caught), [(e["step"], e["where"], e["error"]) for e in runs.entries(output, "error")]


def test_a_tracker_that_cannot_begin(world, runs, tmp_path, monkeypatch):
    folder = tmp_path / "tb"
    folder.mkdir()
    (folder / "safemerge").write_text("a file where the folder should be")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    trainer = world.trainer(tmp_path / "out", world.guard(every=2), report_to=["tensorboard"])
    (words,), ((step, where, error),) = trained(trainer, runs, tmp_path / "out")
    assert "tracker 'tensorboard' failed at step 0 (FileExistsError" in words
    assert (step, where) == (0, "tracker tensorboard")
    assert error.startswith("no more numbers: FileExistsError")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    found = pytest.importorskip("wandb")
    (tmp_path / "home").mkdir()
    for name, value in {"DIR": tmp_path / "home", "MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    yield found
    found.finish()
    # W&B keeps the settings that it began with: the next test is to begin with its own.
    found.teardown()


def test_no_live_wandb_run(world, runs, tmp_path, wandb):
    trainer = world.trainer(tmp_path / "out", world.guard(every=2), report_to=["wandb"])
    (words,), ((step, where, error),) = trained(without_its_own(trainer, "WandbCallback"), runs, tmp_path / "out")
    assert "tracker 'wandb' failed at step 0 (TrackerError: no W&B run is live: log in with `wandb login`" in words
    assert (step, where) == (0, "tracker wandb")
    assert "WANDB_MODE=offline" in error
    assert list((tmp_path / "home").rglob("*.wandb")) == []


def test_a_wandb_run_that_is_ended_in_the_middle(world, runs, tmp_path, wandb):
    wandb.init(project="mine")
    trainer = world.trainer(tmp_path / "out", world.guard(every=2), At(3, wandb.finish), report_to=["wandb"])
    (words,), ((step, where, error),) = trained(without_its_own(trainer, "WandbCallback"), runs, tmp_path / "out")
    assert "tracker 'wandb' failed at step 4 (TrackerError: the W&B run was ended before the training was" in words
    assert (step, where) == (4, "tracker wandb")
    assert error.startswith("no more numbers")


def test_wandb_switched_off_is_no_failure(world, runs, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trainer = world.trainer(tmp_path / "out", world.guard(every=2), report_to=["wandb"])
    assert trained(trainer, runs, tmp_path / "out") == ([], [])


def test_without_a_login_the_trainer_itself_refuses_before_the_first_step(world, tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()
    trainer = world.trainer(tmp_path / "out", world.guard(every=2), report_to=["wandb"])
    with pytest.raises(wandb.errors.UsageError, match=r"wandb.login"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_mlflow_run_that_is_deleted_in_the_middle(world, runs, tmp_path, monkeypatch, mlflow_store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow = pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
        monkeypatch.chdir(tmp_path)
        mlflow.set_experiment(tmp_path.name)
        run = mlflow.start_run()
    delete = At(3, lambda: mlflow.MlflowClient().delete_run(run.info.run_id))
    trainer = world.trainer(tmp_path / "out", world.guard(every=2), delete, report_to=["mlflow"])
    told, noted = trained(without_its_own(trainer, "MLflowCallback"), runs, tmp_path / "out")
    mlflow.MlflowClient().restore_run(run.info.run_id)
    mlflow.end_run()
    assert any("tracker 'mlflow' failed" in words and "must be in the 'active' state" in words for words in told)
    assert {where for _, where, _ in noted} == {"tracker mlflow"}
    assert len(told) == len(noted) <= 2


def test_a_final_merge_after_the_trainer_has_ended_the_trackio_run(world, runs, tmp_path):
    pytest.importorskip("trackio")
    kept = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    guard = world.guard(every=0)

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = world.trainer(tmp_path / "out", Worse(), guard, report_to=["trackio"], project="best", **kept, **best)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    (words,) = ours(caught)
    assert "tracker 'trackio' failed at step 6 (TrackerError: no trackio run is live: it was ended" in words
    assert [e["where"] for e in runs.entries(tmp_path / "out", "error")] == ["tracker trackio"]


def test_a_trackio_run_without_a_final_check_lacks_the_last_picture_only(world, runs, tmp_path):
    pytest.importorskip("trackio")
    guard = world.guard(every=2, at_train_end=False)
    trainer = world.trainer(tmp_path / "out", guard, report_to=["trackio"], project="short")
    assert trained(trainer, runs, tmp_path / "out") == ([], [])


def test_no_room_for_the_files_costs_the_files(world, runs, tmp_path, wandb, monkeypatch):
    class Full(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    trainer = world.trainer(tmp_path / "out", Full(), world.guard(every=2), report_to=["wandb"])
    (words,), ((step, where, error),) = trained(trainer, runs, tmp_path / "out")
    assert "tracker 'wandb' failed at step 6 (FileNotFoundError" in words
    assert (step, where) == (6, "tracker wandb")
    assert error.startswith("no more files")


def fill(folder):
    """What a process runs that may write no file beyond 4 KiB, which is how a full disk or quota looks to it."""
    with warnings.catch_warnings(record=True) as caught, LoopLog(folder, ["tensorboard"]) as log:
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for step in range(200):
            log.numbers(step, {"safemerge/probe/refused": 1.0})
    Path(folder, "warnings.json").write_text(json.dumps([str(w.message) for w in caught]))


def test_a_full_disk_is_told_once_and_the_loop_goes_on(runs, tmp_path):
    run_on(1, fill, tmp_path)
    (words,) = [w for w in json.loads((tmp_path / "warnings.json").read_text()) if w.startswith("safemerge")]
    assert "tracker 'tensorboard' failed" in words
    assert "File too large" in words
    assert [e["where"] for e in runs.entries(tmp_path, "error")] == ["tracker tensorboard"]
