"""`safegrad`: replay's surgery under its paper's name, and what it takes from the task alone."""

import pytest
import torch
from transformers import TrainerCallback

from safemerge_callback import SafeMergeCallback
from safemerge_callback.corrections.safegrad import Safegrad, SafegradSettings
from safemerge_callback.errors import ConfigError
from tests.support.replay import ROWS, replaying
from tests.support.trainer import lora_weights


def train(world, chat_tokenizer, output, guard, *others, **changed):
    trainer = world.trainer(output, guard, *others, tokenizer=chat_tokenizer, learning_rate=2e-2, **changed)
    trainer.train()
    return trainer


def safegrad_of(**settings):
    return SafeMergeCallback(corrections=[{"safegrad": {"rows": ROWS, "batch_size": 3, **settings}}])


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rho", [1.0, 0.5])
def test_it_is_replay_with_surgery_to_the_bit(world, chat_tokenizer, tmp_path, rho, runs):
    ours = train(world, chat_tokenizer, tmp_path / "ours", safegrad_of(rho=rho))
    replay = replaying(loss="kl", surgery=True, first_tokens=None, weight=rho, batch_size=3, harmful_share=None)
    theirs = train(world, chat_tokenizer, tmp_path / "theirs", replay)
    assert same(lora_weights(ours.model), lora_weights(theirs.model))
    assert {entry["correction"] for entry in runs.entries(tmp_path / "ours", "gradient")} == {"safegrad"}


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def test_with_rho_0_the_conflict_alone_is_taken_out(world, chat_tokenizer, tmp_path, runs):
    """The first-order change of the safety loss along the step is then not against it."""
    term = Safegrad(SafegradSettings(rho=0, rows=ROWS))
    task, safety = [torch.tensor([1.0, -2.0])], [torch.tensor([0.0, 0.5])]
    assert torch.equal(term.combine(task, safety)[0], torch.tensor([1.0, 0.0]))
    along = [torch.tensor([1.0, 2.0])]
    assert torch.equal(term.combine(along, safety)[0], along[0])
    before, after = Gradients(), Gradients()
    train(world, chat_tokenizer, tmp_path, before, safegrad_of(rho=0), after)
    moved = [float((torch.cat(a) - torch.cat(b)).norm()) for a, b in zip(before.steps, after.steps, strict=True)]
    assert {entry["weight"] for entry in runs.entries(tmp_path, "gradient")} == {0.0}, "nothing is added"
    assert moved[0] == 0, "at the aligned model there is no safety gradient"
    assert max(moved) > 0


def test_it_stands_beside_replay_and_each_goes_on_with_its_own_rows(world, chat_tokenizer, tmp_path):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def guard():
        rows = {"rows": ROWS, "batch_size": 1}
        return SafeMergeCallback(corrections=[{"safegrad": rows}, {"replay": {**rows, "batch_size": 2}}])

    whole = train(world, chat_tokenizer, tmp_path, guard(), **steps)
    names = {path.name for path in (tmp_path / "checkpoint-2").glob("safemerge_*.json")}
    assert names >= {"safemerge_safegrad.json", "safemerge_replay.json"}
    again = world.trainer(tmp_path, guard(), tokenizer=chat_tokenizer, learning_rate=2e-2, **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(lora_weights(whole.model), lora_weights(again.model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rho": -1}, "rho is -1: give a number of 0 or more"),
        ({"first_tokens": 0}, "first_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"surgery": False}, "setting 'surgery' is unknown"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        safegrad_of(**settings)
