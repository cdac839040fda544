"""What a callback is before, in and after a training: one to a trainer, and plain values once it is over."""

import copy
import gc
import pickle
import weakref

import pytest
from transformers import TrainerCallback

from safemerge_callback import SafetyEvalCallback
from safemerge_callback.errors import ConfigError


@pytest.fixture
def probe(chat_tokenizer):
    def make(**changed):
        knobs = {"every": 2, "max_new_tokens": 2, "tokenizer": chat_tokenizer, "quiet": True, **changed}
        return SafetyEvalCallback({"harm": ["a b", "c d e"]}, {"plain": ["x y", "z"]}, **knobs)

    return make


class Copies(TrainerCallback):
    """Copy and pickle the callbacks in the middle of a training."""

    def __init__(self, *callbacks):
        self.callbacks, self.copies = callbacks, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.copies = [copy.deepcopy(one) for one in self.callbacks]
            self.copies += [pickle.loads(pickle.dumps(one)) for one in self.callbacks]


def test_callbacks_are_copied_and_pickled_before_in_and_after_a_training_and_serve_again(world, runs, tmp_path, probe):
    guard, asked = world.guard(every=2), probe()
    for one in (guard, asked):
        copy.deepcopy(one), pickle.dumps(one)
    middle = Copies(guard, asked)
    world.trainer(tmp_path / "one", guard, asked, middle).train()
    assert len(middle.copies) == 4
    seconds, share = guard.seconds, guard.share
    assert seconds > 0
    assert 0 < share < 1
    assert asked.seconds > 0
    for twin in (copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))):
        assert (twin.seconds, twin.share, twin.progress, twin.config) == (seconds, share, guard.progress, guard.config)
    for twin in (copy.deepcopy(asked), pickle.loads(pickle.dumps(asked))):
        assert twin.seconds == asked.seconds
    world.trainer(tmp_path / "two", guard, asked).train()
    world.trainer(tmp_path / "three", *middle.copies[:2]).train()
    assert [runs.entries(tmp_path / n, "end")[0]["merges"] for n in ("one", "two", "three")] == [3, 3, 3]


@pytest.mark.parametrize("probes", [False, True])
def test_a_finished_callback_holds_no_model(world, tmp_path, probe, probes):
    callbacks = [world.guard(every=0), *([probe()] if probes else [])]
    trainer = world.trainer(tmp_path, *callbacks)
    trainer.train()
    gone = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert gone() is None


def test_a_training_that_was_broken_off_leaves_a_callback_that_can_be_copied(world, tmp_path, probe):
    class Broken(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    guard, asked = world.guard(every=2), probe()
    with pytest.raises(KeyboardInterrupt):
        world.trainer(tmp_path / "one", guard, asked, Broken()).train()
    for one in (guard, asked):
        copy.deepcopy(one), pickle.dumps(one)
    world.trainer(tmp_path / "two", guard, asked).train()
    assert guard.progress.merged_steps == [2, 4, 6]


@pytest.mark.parametrize("which", ["SafeMergeCallback", "SafetyEvalCallback"])
def test_the_same_object_twice_is_refused_before_the_first_step(world, tmp_path, probe, which):
    once = world.guard(every=2) if which == "SafeMergeCallback" else probe()
    trainer = world.trainer(tmp_path, once)
    trainer.add_callback(once)
    with pytest.raises(ConfigError, match=f"its {which} twice: give it once"):
        trainer.train()
    assert trainer.state.global_step == 0
    again = world.trainer(tmp_path, once)
    again.train()
    assert again.state.global_step == 6
