"""`regmean` in real trainings: what it does at a check, what is told of the Grams, and that resumes and ranks agree."""

import json

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from safemerge_callback import live_factors
from safemerge_callback.errors import AdapterError, ConfigError
from safemerge_callback.ops import regression
from tests.support.ranks import run_on
from tests.support.replay import ROWS
from tests.support.trainer import entries, lora_weights
from tests.support.versions import above_bound
from tests.support.world import World

REGMEAN = {"method": "regmean", "safety_adapter": None, "data": {"safety_rows": ROWS, "gram_rows": 48}}


def trained(world, tokenizer, output, guard=None, resume=None, callbacks=(), **changed):
    trainer = world.trainer(output, *([guard] if guard else []), *callbacks, tokenizer=tokenizer, **changed)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Around(TrainerCallback):
    """The factors and the Grams right before a run's own callback has a step, and the factors after it."""

    def __init__(self, guard, when):
        self.guard, self.when, self.seen = guard, when, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        factors = {n: (f.A.detach().clone(), f.B.detach().clone()) for n, f in live_factors(model).items()}
        grams = self.guard.session.data._grams(rehearsal=False) if self.when == "before" else None
        self.seen.append((factors, grams))


def test_a_check_regresses_A_and_leaves_B(world, chat_tokenizer, tmp_path):
    guard = world.guard(**REGMEAN, mu=2.0)
    before, after = Around(guard, "before"), Around(guard, "after")
    trainer = world.trainer(tmp_path, before, guard, after, tokenizer=chat_tokenizer)
    trainer.train()
    ratios = {}
    for step in (2, 4, 6):
        (old, grams), (new, _) = before.seen[step - 1], after.seen[step - 1]
        for name, (A, B) in new.items():
            wanted = regression(grams[name], mu=2.0, ridge=0.3).task_part(old[name][0])
            pairs = [(X.double(), one.double()) for X in grams[name] for one in (A, old[name][0])]
            outputs = [(X @ one.T @ B.double().T).norm() for X, one in pairs]
            ratios[step, name] = outputs[0] / outputs[1], outputs[2] / outputs[3]
            assert torch.equal(B, old[name][1])
            assert torch.allclose(A, wanted.float(), rtol=1e-4, atol=1e-6)
            assert not torch.equal(A, old[name][0])
    for check, merge in zip(entries(tmp_path, "check"), entries(tmp_path, "merge"), strict=True):
        assert all(0 < module["gram_cosine"] <= 1 for module in check["modules"])
        assert all(module["unused_features"] == 0 for module in check["modules"])
        assert (merge["mu"], merge["ridge"], merge["off_diagonal"]) == (2.0, 0.3, 1.0)
        assert {module["task_weight"] for module in merge["modules"]} == {1.0}
        assert {module["residual"] for module in merge["modules"]} == {0.0}
        for module in merge["modules"]:
            outputs = module["task_outputs"], module["safety_outputs"]
            assert outputs == pytest.approx([float(x) for x in ratios[merge["step"], module["name"]]], rel=1e-3)
            assert outputs[1] < outputs[0]


def test_antidote_at_the_end_of_a_training(world, chat_tokenizer, tmp_path):
    guard = world.guard(**{**REGMEAN, "method": "antidote", "every": 0, "knobs": {"prune_share": 0.25}})
    before, after = Around(guard, "no"), Around(guard, "no")
    world.trainer(tmp_path, before, guard, after, tokenizer=chat_tokenizer).train()
    (merge,) = entries(tmp_path, "merge")
    assert (merge["step"], merge["prune_share"]) == (6, 0.25)
    assert all(module["safety_outputs"] < 1 and module["residual"] > 0 for module in merge["modules"])
    for name, (A, B) in after.seen[-1][0].items():
        old = before.seen[-1][0][name]
        assert float((B @ A).norm()) < float((old[1] @ old[0]).norm())


def test_with_a_safety_adapter_it_is_the_second_expert(world, chat_tokenizer, tmp_path):
    guard = world.guard(**{**REGMEAN, "safety_adapter": world.safety})
    trained(world, chat_tokenizer, tmp_path, guard)
    assert all(module["residual"] > 0 for merge in entries(tmp_path, "merge") for module in merge["modules"])


def test_a_resumed_run_is_the_unbroken_one(world, chat_tokenizer, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 1}
    guard = world.guard(**REGMEAN, every=3)
    whole = trained(world, chat_tokenizer, tmp_path, guard, **steps)
    for step in (2, 5):
        folder = str(tmp_path / f"checkpoint-{step}")
        again = trained(world, chat_tokenizer, tmp_path, world.guard(**REGMEAN, every=3), folder, **steps)
        assert same(lora_weights(whole.model), lora_weights(again.model)), step
    file = tmp_path / "checkpoint-2" / "safemerge_task_inputs.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    again = world.trainer(tmp_path, world.guard(**REGMEAN, every=3), tokenizer=chat_tokenizer, **steps)
    with pytest.raises(AdapterError, match="it is not known what was trained on last"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_watching_with_it_alone_changes_nothing(world, chat_tokenizer, tmp_path):
    plain = trained(world, chat_tokenizer, tmp_path / "plain", model=world.model(lora_dropout=0.3))
    guard = world.guard(**REGMEAN, gate="watch")
    asked = trained(world, chat_tokenizer, tmp_path / "asked", guard, model=world.model(lora_dropout=0.3))
    assert same(lora_weights(plain.model), lora_weights(asked.model))
    assert "gram_cosine" in entries(tmp_path / "asked", "check")[0]["modules"][0]


def test_where_the_grams_agree_it_says_that_nothing_is_gained(world, chat_tokenizer, tmp_path, monkeypatch):
    from safemerge_callback.training.run.check_data import RunData

    grams = RunData._grams

    def alike(self, *, rehearsal):
        return {name: pair._replace(safety=pair.task) for name, pair in grams(self, rehearsal=rehearsal).items()}

    monkeypatch.setattr(RunData, "_grams", alike)
    with pytest.warns(UserWarning, match=r"mean cosine 1\.00\): .*pull.*0\.75"):
        trained(world, chat_tokenizer, tmp_path, world.guard(**REGMEAN))


def test_files_alone_are_refused(world, tmp_path):
    from safemerge_callback import merge_adapters

    with pytest.raises(ConfigError, match=r"method 'regmean' asks the model about rows, and safety_rows is missing"):
        merge_adapters(world.safety, None, world.subspace, tmp_path / "out", method="regmean")


def two_ranks(folder, output, tokenizer):
    """Each rank trains on rows of its own; both must merge the same, and a resume must be the unbroken run."""
    from transformers import AutoTokenizer

    world, chat_tokenizer = World.load(folder), AutoTokenizer.from_pretrained(tokenizer)
    steps = {"save_strategy": "steps", "save_steps": 1}
    whole = trained(world, chat_tokenizer, output, world.guard(**REGMEAN, every=3), **steps)
    weights = lora_weights(whole.model)
    mine = torch.cat([w.flatten() for w in weights.values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)
    again = trained(world, chat_tokenizer, output, world.guard(**REGMEAN, every=3), f"{output}/checkpoint-4", **steps)
    assert same(weights, lora_weights(again.model))


def test_two_ranks_regress_by_the_inputs_of_both(world, chat_tokenizer, tmp_path):
    above_bound("transformers", "a run of several ranks on CPUs can be resumed")
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    run_on(2, two_ranks, world.folder, tmp_path / "run", tmp_path / "tokenizer")
    assert len(entries(tmp_path / "run", "merge")) == 2
    assert json.dumps(entries(tmp_path / "run", "check")[0]).count("gram_cosine") == 4
