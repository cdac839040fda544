"""Which optimizers can follow a merge: against a new parameter in the real optimizer, or refused in words."""

import pytest
import torch
from torch import nn

from safemerge_callback.errors import ConfigError
from safemerge_callback.live.optimizer import POLICIES, check_optimizer, edit_optimizer_states


def adafactors():
    import transformers

    fixed = {"scale_parameter": False, "relative_step": False}
    return {
        "torch": lambda p: torch.optim.Adafactor(p, lr=1e-2),
        "transformers": lambda p: transformers.Adafactor(p, lr=1e-2, **fixed),
        "with momentum": lambda p: transformers.Adafactor(p, lr=1e-2, beta1=0.9, **fixed),
    }


def trained(make, steps=5, scale=1.0):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (5,))]
    optimizer = make(parameters)
    for step in range(steps):
        take(optimizer, parameters, step, scale)
    return parameters, optimizer


def take(optimizer, parameters, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=rng)
    optimizer.step()


def fresh(make, parameters):
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    return copies, make(copies)


@pytest.mark.parametrize("kind", ["torch", "transformers", "with momentum"])
def test_a_reset_adafactor_steps_as_a_new_one(kind):
    make = adafactors()[kind]
    parameters, optimizer = trained(make)
    new, other = fresh(make, parameters)
    assert edit_optimizer_states(optimizer, [(p, 1.0) for p in parameters], "reset") >= 3
    for seed in (9, 10):
        take(optimizer, parameters, seed)
        take(other, new, seed)
    for one, two in zip(parameters, new, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["torch", "transformers", "with momentum"])
def test_a_rescaled_adafactor_holds_what_scaled_gradients_would_have_left(kind):
    make = adafactors()[kind]
    parameters, optimizer = trained(make)
    half, other = trained(make, scale=0.5)
    edit_optimizer_states(optimizer, [(p, 0.5) for p in parameters], "rescale")
    for one, two in zip(parameters, half, strict=True):
        for key, value in optimizer.state[one].items():
            if isinstance(value, torch.Tensor) and key not in ("step", "RMS"):
                torch.testing.assert_close(value, other.state[two][key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_a_reset_of_schedule_free_makes_the_saved_weights_the_merged_ones(name):
    schedulefree = pytest.importorskip("schedulefree")
    for policy in ("keep", "rescale"):
        with pytest.raises(ConfigError, match=rf"{name} trains a copy of the weights.*'{policy}'.*set .*'reset'"):
            check_optimizer(getattr(schedulefree, name)([nn.Parameter(torch.randn(2))]), policy)
    for reset in (True, False):

        def make(parameters):
            optimizer = getattr(schedulefree, name)(parameters, lr=0.1)
            optimizer.train()
            return optimizer

        (edited, other), optimizer = trained(make)
        check_optimizer(optimizer, "reset")
        beside = optimizer.state[other]["z"].clone()
        with torch.no_grad():
            edited.mul_(0.5)
        merged = edited.detach().clone()
        assert not reset or edit_optimizer_states(optimizer, [(edited, 1.0)], "reset") == 1
        assert torch.equal(optimizer.state[other]["z"], beside)
        # What the trainer evaluates and saves.
        optimizer.eval()
        assert torch.allclose(edited, merged, atol=1e-6) == reset


def test_a_scale_that_makes_no_sense_is_refused_before_anything_is_edited():
    (one, two), optimizer = trained(torch.optim.AdamW)
    kept = optimizer.state[one]["exp_avg"].clone()
    for wrong in (float("nan"), float("inf"), -0.5):
        with pytest.raises(ConfigError, match=r"scale is (nan|inf|-0.5): give a finite number"):
            edit_optimizer_states(optimizer, [(one, 0.5), (two, wrong)], "rescale")
    assert torch.equal(optimizer.state[one]["exp_avg"], kept)


def test_where_the_gradient_has_become_zero_rescaling_begins_anew():
    """Else second moments of 0 under the old count would make the step after it three times too long."""
    (one, _), optimizer = trained(torch.optim.AdamW)
    assert edit_optimizer_states(optimizer, [(one, 0.0)], "rescale") == 2
    assert float(optimizer.state[one]["step"]) == 0
    before = one.detach().clone()
    optimizer.param_groups[0].update(lr=1e-2, weight_decay=0.0)
    take(optimizer, [one], 9)
    assert float((one.detach() - before).abs().max()) <= 1.01e-2


def test_what_an_old_step_count_would_do_to_moments_of_zero():
    """Why a reset takes the count along: the steps after it, in units of the learning rate."""
    lengths = {}
    for reset in (True, False):
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0)
        found = []
        for step in range(10_030):
            if step == 10_000:
                edit_optimizer_states(optimizer, [(parameter, 1.0)], "reset")
                optimizer.state[parameter]["step"].fill_(0 if reset else 10_000)
            parameter.grad = torch.ones_like(parameter)
            before = parameter.item()
            optimizer.step()
            found.append(before - parameter.item())
        lengths[reset] = found[10_000:]
    assert lengths[True] == pytest.approx([1.0] * 30, rel=1e-3)
    assert lengths[False][0] == pytest.approx(0.1 / 0.001**0.5, rel=1e-3)
    assert max(lengths[False]) == pytest.approx(6.6, abs=0.05)
    assert lengths[False].index(max(lengths[False])) == 11


def test_lookalikes_are_refused_by_package():
    """Of the same class name, but with states that cannot be edited in place, or a step count of their own."""
    for package in ("torchao.optim.adam", "apex.optimizers.fused_adam", "galore_torch.adamw"):
        lookalike = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": package})
        optimizer = lookalike([nn.Parameter(torch.randn(2))])
        check_optimizer(optimizer, "keep")
        for policy in ("reset", "rescale"):
            with pytest.raises(ConfigError, match=rf"optimizer AdamW8bit has no state that optimizer_state='{policy}'"):
                check_optimizer(optimizer, policy)


def test_within_deepspeed_only_adam_is_edited():
    class DeepSpeedZeroOptimizer:
        __module__ = "deepspeed.runtime.zero.stage_1_and_2"

        def __init__(self, optimizer):
            self.optimizer = optimizer

    parameters = [nn.Parameter(torch.randn(2, 2))]
    for policy in POLICIES:
        check_optimizer(DeepSpeedZeroOptimizer(torch.optim.AdamW(parameters)), policy)
    with pytest.raises(ConfigError, match=r"Adafactor in DeepSpeedZeroOptimizer has no state.*in DeepSpeed an Adam"):
        check_optimizer(DeepSpeedZeroOptimizer(torch.optim.Adafactor(parameters)), "reset")


def test_torchaos_eight_bit_adam_is_refused():
    torchao = pytest.importorskip("torchao.optim")
    with pytest.raises(ConfigError, match="AdamW8bit has no state"):
        check_optimizer(torchao.AdamW8bit([nn.Parameter(torch.randn(64, 64))]), "reset")
