"""PiSSA and OLoRA in a training: measured and merged against the factors they began with, and resumed so."""

import math

import pytest
import torch
from safetensors.torch import load_file

from safemerge_callback import undo_merge
from safemerge_callback.errors import AdapterError, PlanError

SAVING = {"save_strategy": "steps", "save_steps": 1}
STARTS = ["pissa", "olora"]
LOSSES = "ignore:safemerge. the adapter.s factors began:UserWarning"


def dense(weights, scaling=2.0):
    found = {}
    for name, A in weights.items():
        if "lora_A" in name:
            B = weights[name.replace("lora_A", "lora_B")]
            found[name.split("layers.")[1].split(".lora_A")[0]] = scaling * B.double() @ A.double()
    return found


def best(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("start", STARTS)
def test_readings_are_of_what_training_changed(world, runs, tmp_path, start):
    model = world.model(init_lora_weights=start)
    began, seen = dense(runs.lora_weights(model)), runs.Recorder()
    world.trainer(tmp_path, seen, world.guard(gate="watch", every=2, safety_adapter=None), model=model).train()
    checks = runs.entries(tmp_path, "check")
    assert [e["step"] for e in checks] == [2, 4, 6]
    for entry in checks:
        now = dense(seen.steps[entry["step"]])
        for reading in entry["modules"]:
            change = now[reading["name"].removeprefix("layers.")] - began[reading["name"].removeprefix("layers.")]
            assert reading["update_norm"] == pytest.approx(float(change.norm()), rel=1e-4)
            assert 0 < reading["cosine"] <= 1


@pytest.mark.filterwarnings(LOSSES)
@pytest.mark.parametrize("start", STARTS)
def test_a_merge_weighs_the_update_and_not_the_part_of_the_base(world, runs, tmp_path, start):
    model = world.model(init_lora_weights=start)
    began, before = dense(runs.lora_weights(model)), runs.Recorder()
    trainer = world.trainer(tmp_path, before, world.guard(every=0), model=model)
    trainer.train()
    safety = runs.updates(runs.saved_weights(world.safety), 2.0)
    after, edits = dense(runs.lora_weights(model)), runs.entries(tmp_path, "merge")[0]["modules"]
    residuals = {edit["name"].removeprefix("layers."): edit["residual"] for edit in edits}
    for name, now in dense(before.steps[6]).items():
        wanted = 0.8 * (now - began[name]) + 0.2 * safety[name]
        exact = best(began[name] + wanted, rank=4)
        assert float((after[name] - exact).norm() / exact.norm()) < 1e-5
        lost = float((began[name] + wanted - exact).norm() / wanted.norm())
        assert residuals[name] == pytest.approx(lost, rel=1e-3)


@pytest.mark.filterwarnings(LOSSES)
def test_a_merge_can_be_undone(world, runs, tmp_path):
    before = runs.Recorder()
    trainer = world.trainer(tmp_path, before, world.guard(every=0), model=world.model(init_lora_weights="pissa"))
    trainer.train()
    trainer.save_model()
    undo_merge(tmp_path)
    plain = {name.replace(".default", ""): tensor for name, tensor in before.steps[6].items()}
    saved = runs.saved_weights(tmp_path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.items())


def test_what_a_merge_would_lose_is_told_before_training(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(every=0), model=world.model(init_lora_weights="pissa"))
    with pytest.warns(UserWarning, match=r"a merge made now would lose \d\d% of the merged update's norm"):
        trainer.train()


@pytest.mark.filterwarnings(LOSSES)
def test_resumed_equals_unbroken(world, runs, tmp_path):
    def train(folder, **changed):
        model = world.model(init_lora_weights="pissa")
        seen = runs.Recorder()
        world.trainer(folder, seen, world.guard(every=2), model=model, **SAVING).train(**changed)
        return seen.end, runs.entries(folder, "check")

    whole, checks = train(tmp_path)
    again, after = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert [e["modules"] for e in after] == [e["modules"] for e in checks]
    kept = load_file(tmp_path / "checkpoint-3" / "safemerge_initial.safetensors")
    assert len(kept) == 8
    (tmp_path / "checkpoint-3" / "safemerge_initial.safetensors").unlink()
    with pytest.raises(AdapterError, match="what training changed is not known"):
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("knobs", [{"space": "factor"}, {"method": "project", "every": 0, "safety_adapter": None}])
def test_what_would_weigh_the_base_is_refused_before_training(world, tmp_path, knobs):
    model = world.model(init_lora_weights="pissa", r=3)
    trainer = world.trainer(tmp_path, world.guard(**knobs), model=model)
    with pytest.raises(PlanError, match="cannot merge factors that began as a part of the base weight"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert math.isfinite(float(next(model.parameters()).sum()))
