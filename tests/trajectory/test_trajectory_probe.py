"""A probe must be bit-identical to absence, and a merge taken back to one that never was."""

import random

import numpy
import pytest
import torch
from transformers import TrainingArguments

from safemerge_callback import SafetyEvalCallback
from safemerge_callback.training import Rollback

SETS = {"prompts": {"bad": ["a b", "c d e", "f"]}, "benign": {"good": ["x y", "z"]}}


def draws(model, tokenizer):
    """A task function that does what it should not: draws, trains, turns the padding, says another score each time."""
    torch.rand(7), random.random(), numpy.random.rand(3)
    model.train()
    model(input_ids=torch.tensor([[1, 5, 9]])).logits.sum()
    tokenizer.padding_side = "left"
    return 0.5


def probe(tokenizer, **changed):
    given = {"every": 1, "max_new_tokens": 5, "tokenizer": tokenizer, "quiet": True, **SETS, **changed}
    return SafetyEvalCallback(**given)


def states(trainer):
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {(i, k): v for i, state in optimizer.items() for k, v in state.items()}
    return dict(trainer.model.state_dict()), moments


def assert_equal(left, right):
    for expected, found in zip(states(left), states(right), strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (left, right)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def run(world, folder, *callbacks, **changed):
    torch.manual_seed(11)
    # dropout draws from the global generator in every step: one draw of ours would show
    trainer = world.trainer(folder, *callbacks, model=world.model(lora_dropout=0.3), **changed)
    trainer.train()
    return trainer, (torch.get_rng_state(), random.getstate(), numpy.random.get_state())


def test_a_probe_every_step_equals_absence_bit_for_bit(world, runs, tmp_path, chat_tokenizer):
    newer = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    changed = {
        "activation_checkpointing" if newer else "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    }
    side = chat_tokenizer.padding_side
    absent, before = run(world, tmp_path / "absent", **changed)
    batches = runs.tokens()[:4]
    loss = {"eval_batches": lambda: [{k: torch.tensor([row[k]]) for k in row} for row in batches]}
    probed, after = run(world, tmp_path / "probed", probe(chat_tokenizer, task=draws, **loss), **changed)
    assert_equal(absent, probed)
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(numpy.array_equal(x, y) for x, y in zip(before[2][:2], after[2][:2], strict=True))
    assert chat_tokenizer.padding_side == side
    assert absent.model.training == probed.model.training
    found = runs.entries(tmp_path / "probed", "probe")
    assert [(e["when"], e["step"]) for e in found] == [("begin", 0), *(("every", n) for n in range(1, 7)), ("end", 6)]
    assert runs.entries(tmp_path / "probed", "error") == []
    assert len({e["measures"][-1]["value"] for e in found}) == 7, "the loss must have moved with training"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_guarded_run_is_the_same_with_and_without_the_probe(world, tmp_path, chat_tokenizer, asynchronous):
    knobs = {"every": 2, "optimizer_state": "rescale", "asynchronous": asynchronous}
    alone, _ = run(world, tmp_path / "alone", world.guard(**knobs))
    for place in (0, 1):
        callbacks = [world.guard(**knobs)]
        callbacks.insert(place, probe(chat_tokenizer, task=draws))
        probed, _ = run(world, tmp_path / f"probed{place}", *callbacks)
        assert_equal(alone, probed)


class Falls:
    """A task whose score falls whenever it is asked again on other weights."""

    def __init__(self):
        self.score = 1.0

    def __call__(self, model, tokenizer):
        self.score -= 0.1
        return self.score


def test_merges_that_are_taken_back_equal_absence_bit_for_bit(world, runs, tmp_path, chat_tokenizer):
    absent, _ = run(world, tmp_path / "absent")
    for policy in ("keep", "reset", "rescale"):
        guard = world.guard(every=2, optimizer_state=policy)
        taken = probe(chat_tokenizer, every=0, task=Falls(), rollback=Rollback(task=0.05))
        with pytest.warns(UserWarning, match="every merge was taken back"):
            undone, _ = run(world, tmp_path / policy, guard, taken)
        assert_equal(absent, undone)
        kinds = [e["kind"] for e in runs.entries(tmp_path / policy)]
        assert kinds.count("merge") == kinds.count("rollback") == 3
        assert guard.progress.task_weights == {}
        assert guard.progress.merged_steps == []
        assert not (tmp_path / policy / "_pre_merge").exists()
        totals = [e["safemerge/modules_merged_total"] for e in undone.state.log_history if "safemerge/modules" in e]
        assert totals == [0.0] * 3
