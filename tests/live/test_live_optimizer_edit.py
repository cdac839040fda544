"""Moments after an edit: what the next step is, against Adam written out in float64."""

import copy

import pytest
import torch
from torch import nn

from safemerge_callback.errors import ConfigError
from safemerge_callback.live.optimizer import POLICIES, check_optimizer, edit_optimizer_states

LR, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8
KINDS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True),
}


def trained(make, steps=5):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(64, 128)) for _ in range(2)]
    optimizer = make(parameters)
    for step in range(steps):
        take(optimizer, parameters, step)
    return parameters, optimizer


def take(optimizer, parameters, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    optimizer.step()


def adam(m, v, grad, step):
    """One step of Adam from given moments, float64: the change of the parameter."""
    m = BETAS[0] * m.double() + (1 - BETAS[0]) * grad.double()
    v = BETAS[1] * v.double() + (1 - BETAS[1]) * grad.double() ** 2
    return -LR * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)


@pytest.mark.parametrize("kind", ["adamw", "foreach", "fused"])
def test_the_step_after_a_reset_is_that_of_a_new_parameter(kind):
    (edited, other), optimizer = trained(KINDS[kind])
    untouched = copy.deepcopy(optimizer.state[other])
    assert edit_optimizer_states(optimizer, [(edited, 1.0)], "reset") == 2
    assert all(torch.equal(optimizer.state[other][k], v) for k, v in untouched.items())
    before = edited.detach().clone()
    take(optimizer, [edited, other], 9)
    expected = adam(torch.zeros(64, 128), torch.zeros(64, 128), edited.grad, step=1)
    torch.testing.assert_close((edited - before).double(), expected, rtol=1e-3, atol=1e-7)
    # the unedited parameter went on counting
    assert float(optimizer.state[other]["step"]) == 6


@pytest.mark.parametrize("kind", ["adamw", "foreach", "fused"])
def test_the_step_after_a_rescale_is_that_of_scaled_moments(kind):
    (edited, other), optimizer = trained(KINDS[kind])
    m, v = (optimizer.state[edited][k].clone() for k in ("exp_avg", "exp_avg_sq"))
    assert edit_optimizer_states(optimizer, [(edited, 0.5)], "rescale") == 2
    before = edited.detach().clone()
    take(optimizer, [edited, other], 9)
    expected = adam(0.5 * m, 0.25 * v, edited.grad, step=6)
    torch.testing.assert_close((edited - before).double(), expected, rtol=1e-3, atol=1e-7)


def test_rescaled_moments_are_those_of_scaled_gradients():
    """The derivation in one line: had all gradients been half as large, the moments would be these."""
    (edited, _), optimizer = trained(KINDS["adamw"])
    torch.manual_seed(0)
    half = [nn.Parameter(torch.randn(64, 128)) for _ in range(2)]
    small = KINDS["adamw"](half)
    for step in range(5):
        rng = torch.Generator().manual_seed(step)
        for parameter in half:
            parameter.grad = 0.5 * torch.randn(parameter.shape, generator=rng)
        small.step()
    edit_optimizer_states(optimizer, [(edited, 0.5)], "rescale")
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[edited][key], small.state[half[0]][key])


def test_keep_touches_nothing_and_amsgrads_maximum_scales_too():
    (edited, _), optimizer = trained(KINDS["amsgrad"])
    kept = copy.deepcopy(optimizer.state[edited])
    assert edit_optimizer_states(optimizer, [(edited, 0.5)], "keep") == 0
    assert all(torch.equal(optimizer.state[edited][k], v) for k, v in kept.items())
    assert edit_optimizer_states(optimizer, [(edited, 0.5)], "rescale") == 3
    assert torch.equal(optimizer.state[edited]["max_exp_avg_sq"], 0.25 * kept["max_exp_avg_sq"])


def test_a_parameter_without_state_and_a_wrapped_optimizer():
    from accelerate import Accelerator

    parameters, optimizer = trained(KINDS["adamw"], steps=0)
    assert edit_optimizer_states(optimizer, [(parameters[0], 0.5)], "reset") == 0
    parameters, optimizer = trained(KINDS["adamw"])
    assert edit_optimizer_states(Accelerator(cpu=True).prepare(optimizer), [(parameters[0], 0.5)], "reset") == 2
    assert float(optimizer.state[parameters[0]]["exp_avg"].abs().max()) == 0


def test_momentum_of_sgd():
    (edited, _), optimizer = trained(lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9))
    momentum = optimizer.state[edited]["momentum_buffer"].clone()
    edit_optimizer_states(optimizer, [(edited, 0.5)], "rescale")
    assert torch.equal(optimizer.state[edited]["momentum_buffer"], 0.5 * momentum)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes(name):
    """Moments of eight bits: half of each block's scale is half of each value."""
    bnb = pytest.importorskip("bitsandbytes")
    (edited, other), optimizer = trained(lambda p: getattr(bnb.optim, name)(p, lr=LR, weight_decay=0.0))
    state = optimizer.state[edited]
    keys = ["absmax1", "absmax2"] if state["state1"].dtype == torch.uint8 else ["state1", "state2"]
    before = [state[k].clone() for k in keys]
    assert edit_optimizer_states(optimizer, [(edited, 0.5)], "rescale") == 2
    for key, was, factor in zip(keys, before, (0.5, 0.25), strict=True):
        torch.testing.assert_close(state[key], factor * was)
    assert edit_optimizer_states(optimizer, [(edited, 1.0)], "reset") == 2
    assert state["step"] == 0
    where = edited.detach().clone()
    take(optimizer, [edited, other], 9)
    expected = adam(torch.zeros(64, 128), torch.zeros(64, 128), edited.grad, step=1)
    # Eight bits keep two digits of a moment; the very small second moments fewer.
    assert float(((edited - where).double() - expected).norm() / expected.norm()) < 0.15


def test_what_cannot_be_edited_is_refused_before_training():
    parameters = [nn.Parameter(torch.randn(4, 4))]
    for policy in POLICIES:
        check_optimizer(None, policy)
        check_optimizer(torch.optim.AdamW(parameters), policy)
    check_optimizer(torch.optim.RMSprop(parameters), "keep")
    for policy in ("reset", "rescale"):
        with pytest.raises(ConfigError, match=rf"optimizer RMSprop has no state that optimizer_state='{policy}'"):
            check_optimizer(torch.optim.RMSprop(parameters), policy)
    with pytest.raises(ConfigError, match=r"optimizer_state 'rest' is unknown.*did you mean 'reset'"):
        check_optimizer(None, "rest")


def test_schedule_free_is_refused_whatever_the_policy():
    class AdamWScheduleFree(torch.optim.AdamW):
        """Of the name and kind that the library schedulefree has."""

    with pytest.raises(ConfigError, match="trains a copy of the weights"):
        check_optimizer(AdamWScheduleFree([nn.Parameter(torch.randn(2))]), "keep")
