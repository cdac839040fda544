"""The checkpoint that the trainer wrote or read is the one that is edited or gone on from, wherever it lies."""

import contextlib
import copy
import json
import os
import pickle
import shutil
import signal
import warnings
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from safemerge_callback.errors import AdapterError

SAVING = {"save_strategy": "steps", "save_steps": 2}
EMA = {"safety_adapter": None, "method": "ema", "ema_every": 1, "ema_decay": 0.7, "every": 2}
PULL = {"safety_adapter": None, "every": 1, "min_task_weight": 0.6}


class StopLate(TrainerCallback):
    """End the run where our hook of the step has passed, as early stopping does, and let that step be saved."""

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == 4:
            control.should_training_stop = True


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(w, right[n]) for n, w in left.items())


def weights(model, name="default"):
    return {n: w.detach().clone() for n, w in get_peft_model_state_dict(model, adapter_name=name).items()}


def file(folder):
    return load_file(folder / "adapter_model.safetensors")


def named(world, name, frozen=None):
    """A model whose trained adapter is called `name`, beside a frozen one where that has a name."""
    from copy import deepcopy

    from peft import get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if frozen is None:
        return get_peft_model(deepcopy(world.aligned), config, name)
    other = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(deepcopy(world.aligned), other, frozen)
    model.add_adapter(name, config)
    model.set_adapter(name)
    return model


@pytest.mark.parametrize(("name", "frozen"), [("policy", None), ("task", "default"), ("default", "reference")])
def test_the_trained_adapter_alone_is_rewritten_wherever_peft_keeps_it(world, tmp_path, name, frozen):
    model = named(world, name, frozen)
    before = weights(model, frozen) if frozen else None
    guard = world.guard(safety_adapter=None, every=0)
    world.trainer(tmp_path, guard, StopLate(), model=model, **SAVING).train()
    assert guard.progress.merged_steps == [4]
    checkpoint = tmp_path / "checkpoint-4"
    assert same(file(checkpoint if name == "default" else checkpoint / name), weights(model, name))
    if frozen:
        assert same(file(checkpoint if frozen == "default" else checkpoint / frozen), before)


class KeepLast(Trainer):
    """A trainer that passes over the best model, as one does that finds no file of it."""

    def _load_best_model(self):
        pass


@pytest.mark.parametrize(("name", "kind"), [("policy", Trainer), ("default", KeepLast)])
def test_weights_that_the_trainer_left_in_place_of_its_best_are_the_last_steps(world, runs, tmp_path, name, kind):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # the loss falls, so that the first checkpoint is the best
    settings = world.settings(tmp_path, **SAVING, **best, metric_for_best_model="eval_loss", greater_is_better=True)
    guard, data = world.guard(safety_adapter=None, every=3), runs.tokens()
    model = named(world, name)
    callbacks = [guard, StopLate()]
    trainer = kind(model, settings, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)
    trainer.train()
    assert trainer.state.best_global_step == 2
    checkpoint = tmp_path / "checkpoint-4"
    assert same(file(checkpoint if name == "default" else checkpoint / name), weights(model, name))
    assert runs.stored(checkpoint)["merged_steps"] == guard.progress.merged_steps == [3, 4]
    assert min(guard.progress.task_weights.values()) == pytest.approx(0.64)


class SaveState(TrainerCallback):
    """Keeps the trainer's state beside the checkpoints, between a checkpoint and our hook."""

    def on_save(self, args, state, control, **kwargs):
        state.save_to_json(str(Path(args.output_dir, "trainer_state.json")))


@pytest.mark.parametrize("name", ["policy", "default"])
def test_a_state_that_a_user_saves_elsewhere_is_no_checkpoint(world, tmp_path, name):
    model, guard = named(world, name), world.guard(**EMA | {"every": 0})
    world.trainer(tmp_path, SaveState(), guard, StopLate(), model=model, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-4"
    assert same(file(checkpoint if name == "default" else checkpoint / name), weights(model, name))
    assert guard.progress.merged_steps == [4]
    assert not (tmp_path / "safemerge_average.safetensors").exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_users_callback_may_copy_the_trainers_state(world, tmp_path, copied):
    kept = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(copied(state))

    world.trainer(tmp_path, world.guard(every=2), Keep(), **SAVING).train()
    kept[1].save_to_json(str(tmp_path / "kept.json"))
    assert json.loads((tmp_path / "kept.json").read_text())["global_step"] == 2


class InTrial(Trainer):
    """A trainer that saves where a hyperparameter search does, in a folder of the trial."""

    def _get_output_dir(self, trial):
        return f"{self.args.output_dir}/run-7"


def test_a_checkpoint_in_a_trials_folder_is_merged_and_gone_on_from(world, runs, tmp_path):
    def trainer(*callbacks, steps=6):
        settings = world.settings(tmp_path, **SAVING, max_steps=steps)
        data = runs.tokens()
        return InTrial(world.model(), settings, train_dataset=data, callbacks=list(callbacks))

    stopped = trainer(world.guard(every=0), StopLate())
    stopped.train()
    place = tmp_path / "run-7" / "checkpoint-4"
    assert same(file(place), weights(stopped.model))
    assert runs.stored(place)["merged_steps"] == [4]
    again = world.guard(every=0)
    trainer(again).train(resume_from_checkpoint=str(place))
    assert again.progress.merged_steps == [4, 6]


def moved(folder, how, elsewhere):
    """The checkpoint of step 4, where `how` puts it."""
    place = {"elsewhere": elsewhere / "checkpoint-4", "renamed": folder / "best", "both": elsewhere / "x"}[how]
    place.parent.mkdir(exist_ok=True)
    return shutil.move(folder / "checkpoint-4", place)


@pytest.mark.parametrize("how", ["elsewhere", "renamed", "both"])
@pytest.mark.parametrize("older", [False, True])
def test_a_moved_checkpoint_resumes_equal_counts_and_average_too(world, runs, tmp_path, how, older):
    whole = world.trainer(tmp_path / "whole", world.guard(**EMA), **SAVING)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    place = moved(tmp_path / "run", how, tmp_path / "backup")
    # what is left behind is of another run, and must not be taken
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-4")
    if older:
        runs.as_older(place)
    resumed = world.trainer(tmp_path / "run", world.guard(**EMA), **SAVING)
    resumed.train(resume_from_checkpoint=str(place))
    assert same(weights(resumed.model), weights(whole.model))
    assert runs.stored(tmp_path / "run" / "checkpoint-6")["merged_steps"] == [2, 4, 6]
    assert runs.entries(tmp_path / "run", "start")[-1]["restored"] is True


def test_the_last_checkpoint_that_the_trainer_finds_itself_resumes_equal(world, runs, tmp_path):
    whole = world.trainer(tmp_path / "whole", world.guard(**EMA), **SAVING)
    whole.train()
    world.trainer(tmp_path / "run", world.guard(**EMA), StopLate(), **SAVING)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "run" / "checkpoint-4", dirs_exist_ok=True)
    resumed = world.trainer(tmp_path / "run", world.guard(**EMA), **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))


def test_initial_factors_travel_and_those_of_another_save_are_refused(world, runs, tmp_path):
    def train(output, **resume):
        model = world.model(init_lora_weights="pissa")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="safemerge: the adapter's factors began")
            trainer = world.trainer(output, world.guard(every=2), model=model, **SAVING)
            trainer.train(**resume)
        return weights(trainer.model)

    expected = train(tmp_path / "one")
    place = shutil.copytree(tmp_path / "one" / "checkpoint-4", tmp_path / "elsewhere")
    assert same(train(tmp_path / "two", resume_from_checkpoint=str(place)), expected)
    shutil.copy(tmp_path / "one" / "checkpoint-2" / "safemerge_initial.safetensors", place)
    with pytest.raises(AdapterError, match="of its own"):
        train(tmp_path / "three", resume_from_checkpoint=str(place))


def without_state(folder):
    path = folder / "trainer_state.json"
    whole = json.loads(path.read_text())
    whole["stateful_callbacks"].pop("safemerge")
    path.write_text(json.dumps(whole))


def damaged(folder):
    path = folder / "trainer_state.json"
    whole = json.loads(path.read_text())
    whole["stateful_callbacks"]["safemerge"]["run"]["progress"]["checks"] = "three"
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(("harm", "reason"), [(without_state, "holds no state"), (damaged, "cannot be read")])
@pytest.mark.parametrize("journal", [True, False])
def test_a_resume_without_a_state_is_told_once_and_counts_as_the_journal_does(
    world, runs, tmp_path, harm, reason, journal
):
    world.trainer(tmp_path / "one", world.guard(**PULL), **SAVING, max_steps=4).train()
    harm(tmp_path / "one" / "checkpoint-4")
    output = tmp_path / "one" if journal else tmp_path / "two"
    guard = world.guard(**PULL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = world.trainer(output, guard, **SAVING, max_steps=8)
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    told = [str(w.message) for w in caught if "safemerge" in str(w.message)]
    instead = r"counts are the journal's (2 merges until then)" if journal else "all counts begin anew"
    assert len(told) == 1
    assert reason in told[0]
    assert instead in told[0]
    # the floor of 0.6 stands only where it is known what is left: 0.8 twice is 0.64
    assert (guard.progress.merges, min(guard.progress.task_weights.values())) == (2, pytest.approx(0.64))


def test_a_state_left_by_an_earlier_part_of_the_run_is_told(world, tmp_path):
    world.trainer(tmp_path, world.guard(every=2), **SAVING, max_steps=2).train()
    world.trainer(tmp_path, **SAVING, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    guard = world.guard(every=2)
    with pytest.warns(UserWarning, match="state is of step 2, since when it was trained without"):
        world.trainer(tmp_path, guard, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert guard.progress.merged_steps == [2, 6]


class Kill(TrainerCallback):
    """Die without a word where the trainer's checkpoint of step 4 counts as whole, before any other hook."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "knobs", [PULL, {"every": 2, "asynchronous": True}, EMA, {**EMA, "every": 3, "ema_every": 3, "asynchronous": True}]
)
def test_a_kill_right_after_the_trainers_last_file_resumes_equal(world, runs, tmp_path, knobs):
    whole = world.trainer(tmp_path / "whole", world.guard(**knobs), **SAVING, max_steps=8)
    whole.train()

    def killed():
        world.trainer(tmp_path / "run", Kill(), world.guard(**knobs), **SAVING, max_steps=8).train()

    child = get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    resumed = world.trainer(tmp_path / "run", world.guard(**knobs), **SAVING, max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))
    kinds = [[(e["kind"], e["step"]) for e in runs.entries(tmp_path / f)] for f in ("whole", "run")]
    assert [one for one in kinds[1] if one != ("start", 4)] == kinds[0]


def test_the_trainers_state_has_its_own_method_back_after_training(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(every=0), **SAVING)
    trainer.train()
    assert "save_to_json" not in vars(trainer.state)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "checkpoint-6")
    trainer.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["stateful_callbacks"]["safemerge"]["run"]
