"""A gradient term in each trainer: it adds the gradient of its loss, and the task's own is what it would have been."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from transformers import TrainerCallback

from benchmarks.trainers import data
from benchmarks.trainers.setups import plain
from benchmarks.trainers_matrix import CELLS
from safemerge_callback.corrections.registry import CORRECTIONS, correction
from safemerge_callback.corrections.schedule import Schedule

# trl 1.16 sets by default what transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
BY_NAME = {cell.name: cell for cell in CELLS}
TRAINERS = [
    "Trainer",
    "Trainer, sequence classification",
    "SFTTrainer",
    "DPOTrainer",
    "KTOTrainer",
    "RewardTrainer",
    "GRPOTrainer",
    "bf16 base, bf16 factors",
    "model.compile() before the trainer",
    "SFTTrainer, packing (bfd)",
]
QUANTISED = ["bitsandbytes nf4, SFTTrainer", "bitsandbytes int8, Trainer"]


@dataclass(frozen=True, kw_only=True)
class TermSettings(Schedule):
    weight: float = 0.5


class Logits:
    """The mean square of what the model says to rows of the term's own, whatever head it has."""

    name = "logits"

    def __init__(self, settings):
        self.schedule, self.weight = settings, settings.weight

    def loss(self, at, model):
        return of_logits(model)


def of_logits(model):
    ids = torch.arange(9, 29).reshape(2, 10)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().square().mean()


@pytest.fixture(autouse=True)
def entered():
    @correction(TermSettings, cost="one pass each way")
    def logits(settings):
        return Logits(settings)

    yield
    CORRECTIONS.pop("logits")


class Seen(TrainerCallback):
    """The first step's gradients as the optimizer gets them, and before it that of the term's loss by itself."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            random, modes = torch.get_rng_state(), [m for m in model.modules() if not m.training]
            with torch.enable_grad():
                of_logits(model.train()).backward()
            self.term = gradients(model)
            model.zero_grad()
            torch.set_rng_state(random)
            for module in modes:
                module.training = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.step, self.random = gradients(model), torch.get_rng_state()


def gradients(model):
    return {n: p.grad.detach().float().clone() for n, p in model.named_parameters() if p.grad is not None}


def first_step(make, base, folder, corrections, **changed):
    torch.manual_seed(3)
    seen = Seen()
    guard = base.guard(gate="watch", every=0, corrections=corrections)
    trainer = make(base, str(folder), [seen, guard]).trainer
    trainer.args.max_steps, trainer.args.max_grad_norm = 1, 0.0
    for key, value in changed.items():
        setattr(trainer.args, key, value)
    trainer.train()
    seen.trainer = trainer
    return seen


def check_added(make, base, folder, rounded=False, **changed):
    """And return the trainer."""
    alone = first_step(make, base, folder / "plain", None, **changed)
    ours = first_step(make, base, folder / "ours", [{"logits": {"weight": 0.5}}], **changed)
    assert torch.equal(alone.random, ours.random)
    # A difference of two sums in bf16 is rounded as the sums are.
    scale = max(float(g.abs().max()) for g in (*ours.term.values(), *(ours.step.values() if rounded else ())))
    assert scale > 0
    assert ours.term.keys() <= ours.step.keys()
    closeness = 2e-2 if rounded else 1e-5
    for key, gradient in ours.step.items():
        added = gradient - alone.step[key] if key in alone.step else gradient
        wanted = 0.5 * ours.term[key] if key in ours.term else torch.zeros_like(added)
        assert torch.allclose(added, wanted, rtol=0, atol=closeness * scale), (key, float((added - wanted).abs().max()))
    return ours.trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_gets_the_terms_gradient(name, bases, tmp_path):
    check_added(BY_NAME[name].make, bases(BY_NAME[name].family), tmp_path, "bf16" in name)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_base_gets_it(name, bases, tmp_path):
    check_added(BY_NAME[name].make, bases("wide"), tmp_path, rounded=True)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer"])
def test_it_is_added_under_gradient_checkpointing(name, reentrant, bases, tmp_path):
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = check_added(BY_NAME[name].make, bases("llama"), tmp_path, **how)
    assert trainer.model.is_gradient_checkpointing


# torch's own compiler, of its own modules
@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_is_added_to_a_model_that_the_trainer_compiles(backend, bases, tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": backend}
    trainer = check_added(plain(data.tokens, options=options), bases("llama"), tmp_path)
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
