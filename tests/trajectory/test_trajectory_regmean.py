"""`regmean` on each engine is `regmean` in one process: two ranks of one row each give the Grams of both rows."""

import importlib.util

import pytest
import torch

from tests.support.ranks import finish, started
from tests.support.trainer import entries
from tests.trajectory.engines import regmean as engine_runs
from tests.trajectory.test_trajectory_engines import furthest, same_bits


def read(out, job, rank=0):
    return torch.load(out / f"{job}-rank{rank}.pt", weights_only=False)


def check(world, tokenizer, out, jobs):
    tokenizer.save_pretrained(out / "tokenizer")
    with (
        started(2, engine_runs.main, world.folder, out, *jobs) as two,
        started(1, engine_runs.main, world.folder, out, "single") as one,
    ):
        finish(one)
        finish(two)
    alone = read(out, "single")["steps"]
    assert len(entries(out / "single", "merge")) == 3
    for job in jobs:
        mine = read(out, job)
        if job.endswith("-slope"):
            assert "gate 'safety_slope' needs 'safety_slope', which is taken on" in mine["refused"]
            continue
        assert same_bits(mine["steps"], read(out, job, 1)["steps"]), job
        distance = furthest(mine["steps"], alone)
        print(f"{job}: {distance:.1e} from one process")
        assert distance < 1e-4, job


def test_sharded_engines_regress_as_one_process_does(world, chat_tokenizer, tmp_path):
    check(world, chat_tokenizer, tmp_path, ["fsdp2", "fsdp2-slope"])


@pytest.mark.slow
def test_every_engine_regresses_as_one_process_does(world, chat_tokenizer, tmp_path):
    deepspeed = ["zero0", "zero1", "zero2", "zero3"] if importlib.util.find_spec("deepspeed") else []
    check(world, chat_tokenizer, tmp_path, ["ddp", "fsdp1", "fsdp1flat", *deepspeed])
