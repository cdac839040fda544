"""A gradient term under DDP: the mean over the ranks of each rank's own rows, and both ranks end equal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from safemerge_callback.corrections.gradient import add_gradient
from safemerge_callback.corrections.protocol import RunPoint
from safemerge_callback.corrections.registry import correction
from safemerge_callback.corrections.schedule import Schedule
from safemerge_callback.live.engine import engine_of
from safemerge_callback.live.micro_batch import micro_batch
from tests.support.ranks import run_on
from tests.support.trainer import lora_weights
from tests.support.world import World


@dataclass(frozen=True, kw_only=True)
class Rows(Schedule):
    weight: float = 0.5


class OnRows:
    """The model's loss on one row, another on each rank."""

    name = "rows"

    def __init__(self, settings):
        self.schedule, self.weight = settings, settings.weight

    def loss(self, at, model):
        return model(**row(dist.get_rank())).loss


def row(rank):
    ids = torch.arange(3, 11).reshape(1, 8) + 8 * rank
    return {"input_ids": ids, "labels": ids}


class FirstGradients(TrainerCallback):
    """The gradients of the first step as the optimizer gets them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(folder, out):
    """What each process runs: the same training with the term and without."""
    world, out, done = World.load(folder), Path(out), {}

    @correction(Rows, cost="one pass each way")
    def rows(settings):
        return OnRows(settings)

    settings = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}
    for name, listed in {"with": [{"rows": {}}], "without": None}.items():
        seen = FirstGradients()
        guard = world.guard(gate="watch", safety_adapter=None, every=1, corrections=listed)
        trainer = world.trainer(out / name, guard, seen, max_steps=2, **settings)
        trainer.train()
        done[name] = seen.first, lora_weights(trainer.model)
    added = {name: gradient - done["without"][0][name] for name, gradient in done["with"][0].items()}
    torch.save({"added": added, "end": done["with"][1]}, out / f"rank{dist.get_rank()}.pt")


def test_under_ddp_it_is_the_mean_over_the_ranks(world, runs, tmp_path):
    run_on(2, train, world.folder, tmp_path)
    one, other = (torch.load(tmp_path / f"rank{n}.pt", weights_only=True) for n in (0, 1))
    assert all(torch.equal(one["end"][name], other["end"][name]) for name in one["end"])
    model = world.model().train()
    for rank in (0, 1):
        (0.5 * 0.5 * model(**row(rank)).loss).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(float(g.abs().max()) for g in want.values()) > 1e-4
    for name, gradient in want.items():
        assert torch.allclose(one["added"][name], gradient, rtol=0, atol=1e-6), name
    assert [(e["step"], e["steps"]) for e in runs.entries(tmp_path / "with", "gradient")] == [(1, 1), (2, 1)]


def test_a_plain_model_is_of_one_process(world):
    assert engine_of(world.model()) == "one process"


class Term:
    name, weight = "term", 2.0

    def loss(self, at, model):
        assert model.training
        return model(torch.ones(3)).square().mean()


AT = RunPoint(0, 1, cast(Any, None), cast(Any, None))


def test_modes_and_gradients_are_given_back():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).eval()
    model[0].weight.grad = torch.ones(2, 3)
    random = torch.get_rng_state()
    done = add_gradient(Term(), AT, micro_batch(model))
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert done.fault is None
    added = model[0].weight.grad - 1
    model.train()
    model[0].weight.grad = None
    Term().loss(None, model).backward()
    assert torch.allclose(added, 2 * model[0].weight.grad, atol=1e-6)


def test_a_loss_that_is_no_scalar_is_refused_and_leaves_no_gradient():
    class Rows(Term):
        def loss(self, at, model):
            return model(torch.ones(3))

    model = nn.Linear(3, 2)
    done = add_gradient(Rows(), AT, micro_batch(model))
    assert "ValueError: the loss of 'term' has the shape (2,)" in done.fault.error
    assert model.weight.grad is None
