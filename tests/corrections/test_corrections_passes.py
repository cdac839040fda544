"""A term of several passes: at displaced points, all or nothing, and the parameters come back to the bit."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from safemerge_callback.corrections.gradient import GradientEngine, way_for
from safemerge_callback.corrections.protocol import PassSeries, RunPoint, TermPass
from safemerge_callback.corrections.registry import correction
from safemerge_callback.corrections.schedule import Schedule
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.micro_batch import MicroBatch, micro_batch
from safemerge_callback.record.log import Log
from tests.support.ranks import run_on
from tests.support.trainer import lora_weights
from tests.support.world import World

ALPHA, LAMBDA = 0.1, 5.0


@dataclass(frozen=True, kw_only=True)
class Settings(Schedule):
    weight: float = LAMBDA
    alpha: float = ALPHA


class Flatter:
    """Booster's two passes: λ(∇h(w) - ∇h(w - alpha·∇h/‖∇h‖))."""

    name = "flatter"

    def __init__(self, settings=None, loss=None):
        self.schedule = settings or Settings()
        self.weight, self.alpha = self.schedule.weight, self.schedule.alpha
        self.h = loss or h

    def passes(self, at, model, trained):
        gradient = yield TermPass(1.0, self.h)
        step = -self.alpha / trained.norm(gradient)
        yield TermPass(-1.0, self.h, gradient * step)


def h(model):
    return (model(torch.ones(3, dtype=model[0].weight.dtype)) - 1).square().sum() / 2


def at(step=0):
    return RunPoint(step, 10, cast(Any, None), cast(Any, None))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2, dtype=torch.float64))


def engine(model, term):
    return GradientEngine([term], micro_batch(model), Log(quiet=True))


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def gradients(model):
    return flat(p.grad for p in model.parameters())


def test_of_a_quadratic_it_is_the_curvature_along_the_gradient(model):
    """λ·alpha·H·ĝ, exactly; what the step has of its own stays, and the parameters are those that they were."""
    parameters = list(model.parameters())
    before = flat(parameters)
    (g,) = [flat(torch.autograd.grad(h(model), parameters))]
    hessian = torch.autograd.functional.hessian(
        lambda weight, bias: (torch.ones(3, dtype=torch.float64) @ weight.T + bias - 1).square().sum() / 2,
        tuple(p.detach() for p in parameters),
    )
    whole = torch.cat(
        [torch.cat([x.reshape(p.numel(), -1) for x in row], 1) for p, row in zip(parameters, hessian, strict=True)]
    )
    for p in parameters:
        p.grad = torch.ones_like(p)
    flatter = engine(model, Flatter())
    flatter.before_step(at(), measured=True)
    wanted = LAMBDA * ALPHA * whole @ (g / g.norm())
    assert torch.allclose(gradients(model) - 1, wanted, rtol=0, atol=1e-14)
    assert torch.equal(flat(parameters), before)
    numbers = flatter.report(1)
    assert numbers["safemerge/corrections/flatter/loss"] == pytest.approx(float(h(model).detach()))


@pytest.mark.parametrize("alpha", [1e-3, 1e-5])
def test_with_alpha_it_vanishes(model, alpha):
    engine(model, Flatter(Settings(alpha=alpha))).before_step(at())
    assert float(gradients(model).norm()) == pytest.approx(LAMBDA * alpha * 4, rel=1e-6)


@dataclass
class Broken:
    """A loss that does so in its second pass."""

    how: str
    times: int = 0

    def __call__(self, model):
        self.times += 1
        loss = h(model)
        if self.times % 2:
            return loss
        if self.how == "raises":
            raise RuntimeError("no room")
        return loss.sqrt() * 0 / 0 if self.how == "loss" else (loss * 0).sqrt()


@pytest.mark.parametrize(
    ("how", "words"),
    [("loss", "its loss is nan"), ("gradient", "the norm of its gradient is nan"), ("raises", "RuntimeError: no room")],
)
def test_what_fails_at_the_displaced_point_costs_the_whole_sum(model, how, words, recwarn):
    """Told once; in bf16 the parameters have their bits, where adding and taking away again would round."""
    model.bfloat16()
    before, random = flat(model.parameters()), torch.get_rng_state()
    model[0].bias.grad = torch.ones(2, dtype=torch.bfloat16)
    flatter = engine(model, Flatter(loss=Broken(how)))
    for step in (0, 1):
        flatter.before_step(at(step))
        assert model[0].weight.grad is None
        assert torch.equal(model[0].bias.grad, torch.ones(2))
        assert torch.equal(flat(model.parameters()), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [w.message.args[0] for w in recwarn] == [
        f"safemerge: flatter failed at step 1, which goes without its gradient: {words}"
    ]
    assert not flatter.untold


def test_the_passes_of_a_step_drop_out_the_same():
    """Two passes at one point, the second less: nothing is left of them. And the task's random state is its own."""

    class Same(Flatter):
        def passes(self, at, model, trained):
            yield TermPass(1.0, self.h)
            yield TermPass(-1.0, self.h)

    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5))
    random = torch.get_rng_state()
    engine(model, Same(loss=lambda model: model(torch.ones(3)).sum())).before_step(at())
    assert float(gradients(model).abs().max()) == 0
    assert torch.equal(torch.get_rng_state(), random)


def test_a_gradient_of_nothing_may_be_divided_by(model):
    """0/0 is the term's to avoid; where it does not, this step goes without it."""
    with pytest.warns(UserWarning, match="flatter failed at step 1, .* its loss is nan"):
        engine(model, Flatter(loss=lambda model: 0 * h(model))).before_step(at())
    assert model[0].weight.grad is None


def test_a_displacement_of_another_size_is_said(model):
    class Wrong(Flatter):
        def passes(self, at, model, trained):
            yield TermPass(1.0, self.h, torch.ones(3))

    with pytest.warns(UserWarning, match=r"a vector of the shape \(3,\) for 8 parameters of this rank"):
        engine(model, Wrong()).before_step(at())


def test_an_engine_that_shows_no_gradient_is_refused(model):
    assert isinstance(Flatter(), PassSeries)
    from safemerge_callback.corrections.gradient import _check_seen

    hidden = MicroBatch(model, lambda loss: None, collective=True)
    with pytest.raises(ConfigError, match="'flatter' makes its gradient of several passes, and DeepSpeed shows none"):
        _check_seen(Flatter(), hidden)
    scaled = type("Optimizer", (), {"scaler": torch.amp.GradScaler("cpu")})()
    with pytest.raises(ConfigError, match="'flatter' makes its gradient of several passes, where fp16's scaler"):
        way_for([Flatter()], model, scaled)


def of_the_model(model):
    """The live model's loss on one row, another on each rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    ids = torch.arange(3, 11).reshape(1, 8) + 8 * rank
    return model(input_ids=ids, labels=ids).loss


def entered():
    @correction(Settings, cost="two passes each way")
    def flatter(settings):
        return Flatter(settings, of_the_model)


def trained(world, output, listed, **changed):
    guard = world.guard(gate="watch", safety_adapter=None, every=1, corrections=listed)
    trainer = world.trainer(output, guard, max_steps=2, max_grad_norm=0.0, **changed)
    trainer.train()
    return lora_weights(trainer.model)


@pytest.fixture
def listed(monkeypatch):
    from safemerge_callback.corrections import registry

    monkeypatch.setattr(registry, "CORRECTIONS", dict(registry.CORRECTIONS))
    entered()
    return lambda **settings: [{"flatter": settings}]


def test_in_a_trainer_weight_0_is_absence_and_accumulation_changes_nothing(world, listed, tmp_path):
    none = trained(world, tmp_path / "none", None)
    zero = trained(world, tmp_path / "zero", listed(weight=0))
    assert all(torch.equal(none[name], zero[name]) for name in none)
    ends = []
    for each, times in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": each, "gradient_accumulation_steps": times, "optim": "sgd"}
        ends.append(flat(trained(world, tmp_path / str(each), listed(), learning_rate=1.0, **sizes).values()))
    plain = flat(trained(world, tmp_path / "plain", None, learning_rate=1.0, optim="sgd").values())
    assert torch.allclose(*ends, rtol=0, atol=1e-5)
    assert float((ends[0] - plain).norm()) > 1e-2


def both_ranks(folder, out):
    """What each process runs: a step's gradients of the term alone, and then its rank's second pass fails."""
    dist.init_process_group("gloo")
    world = World.load(folder)
    model = world.model(init_lora_weights=False)
    flatter = engine(model, Flatter(loss=of_the_model))
    flatter.before_step(at())
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.save(named, Path(out) / f"rank{dist.get_rank()}.pt")
    model.zero_grad()
    times = iter([of_the_model, (lambda model: 1 / 0) if dist.get_rank() else of_the_model])
    flatter.terms = [Flatter(loss=lambda model: next(times)(model))]
    flatter.before_step(at(1))
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_come_to_the_gradient_of_their_mean_loss(world, tmp_path):
    run_on(2, both_ranks, world.folder, tmp_path)
    one, other = (torch.load(tmp_path / f"rank{n}.pt", weights_only=True) for n in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = world.model(init_lora_weights=False)

    def mean(model):
        rows = [torch.arange(3, 11).reshape(1, 8) + 8 * rank for rank in (0, 1)]
        return sum(model(input_ids=ids, labels=ids).loss for ids in rows) / 2

    engine(model, Flatter(loss=mean)).before_step(at())
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert scale > 1e-3
    assert math.isfinite(scale)
    assert all(torch.allclose(one[name], wanted[name], rtol=0, atol=1e-4 * scale) for name in wanted)
