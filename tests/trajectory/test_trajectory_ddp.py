"""Two processes: one journal, one set of factors, equal to the bit."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from safemerge_callback import live_factors
from safemerge_callback.live.fingerprint import digest
from tests.support.ranks import run_on
from tests.support.trainer import Recorder
from tests.support.world import World


class Digests(TrainerCallback):
    """The digest of the factors at the end of every step."""

    def __init__(self):
        self.steps = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps[state.global_step] = digest(live_factors(model))


def stray(step, model):
    """Rank 1's factors leave rank 0's by a little, as another host's linear algebra might let them."""
    if step == 2 and dist.get_rank() == 1:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(1e-4)


def train(folder, out, knobs, *resume):
    """What each process runs."""
    world, out, seen = World.load(folder), Path(out), Digests()
    saving = {"save_strategy": "steps", "save_steps": 2, "ddp_find_unused_parameters": False}
    guard = world.guard(**{"every": 2, **json.loads(knobs)})
    trainer = world.trainer(out / "run", Recorder(stray), guard, seen, max_steps=4, **saving)
    trainer.train(resume_from_checkpoint=resume[0] if resume else None)
    assert dist.get_world_size() == 2
    assert "wandb" not in sys.modules
    told = {"end": digest(live_factors(trainer.model)), "steps": seen.steps}
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))


def two_processes(world, tmp_path, *resume, **knobs):
    """Train in two processes with these settings; return what each ended with."""
    run_on(2, train, world.folder, tmp_path, json.dumps(knobs), *resume)
    return [json.loads((tmp_path / f"rank{n}.json").read_text()) for n in (0, 1)]


def test_two_processes_end_equal_with_one_journal(world, runs, tmp_path):
    left, right = two_processes(world, tmp_path)
    assert left == right
    assert len(set(left["steps"].values())) == 4
    assert [e["kind"] for e in runs.entries(tmp_path / "run")] == ["start", *["check", "merge"] * 2, "end"]
    assert runs.stored(tmp_path / "run" / "checkpoint-4")["merged_steps"] == [2, 4]


@pytest.mark.parametrize(
    "how",
    [
        {"method": "ema", "safety_adapter": None, "ema_every": 1, "ema_decay": 0.5},
        {"method": "project", "operator": "orthogonal", "operator_rank": 4, "safety_adapter": None},
    ],
    ids=lambda how: how["method"],
)
def test_an_average_and_a_basis_of_each_rank_are_the_same(world, runs, tmp_path, how):
    """Each rank keeps its own; rank 1's factors are a little off at step 2, and the merge puts rank 0's in place."""
    left, right = two_processes(world, tmp_path, **how)
    assert left == right
    assert [e["kind"] for e in runs.entries(tmp_path / "run")] == ["start", *["check", "merge"] * 2, "end"]


def test_a_checkpoint_of_one_process_goes_on_in_two(world, runs, tmp_path):
    """Counts and journal go on; the entry of the resume tells the new number of processes."""
    # Without the optimizer: transformers 5.0 restores its tensors to a device "cpu:1" and fails.
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_only_model": True}
    world.trainer(tmp_path / "run", world.guard(every=2, at_train_end=False), **saving).train()
    left, right = two_processes(world, tmp_path, str(tmp_path / "run" / "checkpoint-2"))
    assert left == right
    assert [e["step"] for e in runs.entries(tmp_path / "run", "merge")] == [2, 4]
    starts = runs.entries(tmp_path / "run", "start")
    assert [(e["step"], e["world_size"], e.get("restored")) for e in starts] == [(0, 1, False), (2, 2, True)]
    assert [m["task_weight"] for m in runs.entries(tmp_path / "run", "merge")[-1]["modules"]] == [0.8 * 0.8] * 4
