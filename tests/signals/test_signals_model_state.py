"""A signal gives back all that it needs otherwise, however it ends."""

import contextlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import set_seed

from safemerge_callback.signals.model_state import preserve_state


@pytest.fixture
def model(tiny_llama):
    """In the middle of a training: some modules evaluate, some parameters are frozen, some have a gradient."""
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad = i % 3 > 0
        parameter.grad = torch.full_like(parameter, i) if i % 3 == 1 else None
    set_seed(3)
    return model


def state_of(model, tokenizer):
    """All that a signal has to give back, and the very tensors that hold the gradients."""
    parameters = list(model.parameters())
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in parameters],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.sum().item()) for p in parameters],
        "weights": [p.detach().sum().item() for p in parameters],
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "padding": tokenizer.padding_side,
        "gradients are taken": torch.is_grad_enabled(),
    }


def disturb(model, tokenizer):
    """Move everything that may be moved."""
    random.random(), np.random.rand(), torch.rand(1)
    tokenizer.padding_side = "left"
    model.model.layers[1].train()
    if torch.is_grad_enabled():
        for parameter in model.parameters():
            parameter.requires_grad = True
        ids = torch.tensor([[1, 2, 3]])
        model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_all_is_given_back_after_an_end_and_after_an_exception(model, gradients, fails):
    tokenizer = SimpleNamespace(padding_side="right")
    before = state_of(model, tokenizer)
    with (
        pytest.raises(InterruptedError) if fails else contextlib.nullcontext(),
        preserve_state(model, tokenizer, gradients=gradients),
    ):
        assert not any(module.training for module in model.modules())
        disturb(model, tokenizer)
        within = state_of(model, tokenizer)
        if fails:
            raise InterruptedError
    assert state_of(model, tokenizer) == before
    same = {"weights", "gradients are taken"} if gradients else {"weights", "flags", "gradients"}
    assert {key for key, value in within.items() if value == before[key]} == same


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_gradients_are_taken_where_the_caller_takes_none_and_begin_at_none(model, outside):
    ids = torch.tensor([[1, 2, 3]])
    parameter = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    fresh = torch.autograd.grad(model.eval()(input_ids=ids, labels=ids).loss, parameter)[0]
    model.train()
    parameter.grad = torch.ones_like(parameter)
    with outside():
        with preserve_state(model, gradients=True):
            assert all(p.grad is None for p in model.parameters())
            model(input_ids=ids, labels=ids).loss.backward()
            assert torch.equal(parameter.grad, fresh)
        assert torch.is_grad_enabled() == (outside is torch.enable_grad)
        with preserve_state(model):
            assert not torch.is_grad_enabled()
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_what_draws_nothing_from_the_random_state_leaves_the_next_draw_as_it_was(model):
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    set_seed(3)
    with preserve_state(model, gradients=True):
        random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
