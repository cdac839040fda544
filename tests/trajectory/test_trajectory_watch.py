"""Watching must be bit-identical to absence."""

import torch


def states(trainer):
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {(i, k): v for i, state in optimizer.items() for k, v in state.items()}
    return dict(trainer.model.state_dict()), moments


def test_watching_equals_absence_bit_for_bit(world, runs, tmp_path):
    trainers = {}
    seeds = {}
    for name, callbacks in {"absent": [], "watched": [world.guard(gate="watch", safety_adapter=None, every=1)]}.items():
        torch.manual_seed(11)
        # dropout draws from the global generator in every step: one draw of ours would show
        trainer = world.trainer(tmp_path / name, *callbacks, model=world.model(lora_dropout=0.3))
        trainer.train()
        trainers[name], seeds[name] = trainer, torch.get_rng_state()
    absent, watched = trainers["absent"], trainers["watched"]
    for expected, found in zip(states(absent), states(watched), strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (absent, watched)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert torch.equal(seeds["absent"], seeds["watched"])
    for left, right in zip(absent.model.named_parameters(), watched.model.named_parameters(), strict=True):
        assert left[0] == right[0]
        assert (left[1].dtype, left[1].requires_grad) == (right[1].dtype, right[1].requires_grad)
    assert absent.model.training == watched.model.training
    assert len(runs.entries(tmp_path / "watched", "check")) == 6
    assert runs.entries(tmp_path / "watched", "merge") == []


def test_a_merge_that_keeps_the_task_whole_equals_absence_bit_for_bit(world, tmp_path):
    trainers = {}
    for name, callbacks in {"absent": [], "merged": [world.guard(weights=[1.0, 0.0], every=1)]}.items():
        torch.manual_seed(11)
        trainers[name] = world.trainer(tmp_path / name, *callbacks, model=world.model(lora_dropout=0.3))
        trainers[name].train()
    expected, found = (dict(t.model.state_dict()) for t in trainers.values())
    assert all(torch.equal(expected[k], found[k]) for k in expected)
