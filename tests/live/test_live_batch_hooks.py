"""What an error leaves on a model does nothing to the next training, whoever that is of."""

import gc
import threading
from weakref import ref

import pytest
import torch
from torch import nn

from safemerge_callback import SafeMergeCallback
from safemerge_callback.live.batch_hooks import batch_hooks, begin_run, hooked, unhook
from tests.support.replay import ROWS
from tests.support.trainer import lora_weights

HARMFUL = [{"prompt": "a b c", "response": "w0 w1 yes"}]
KINDS = {
    "t_vaccine": {"rows": HARMFUL, "num_blocks": 1, "batch_size": 1, "share": 0.1},
    "vaccine": {"share": 0.1},
    "constrained": {},
    "lisa": {"rows": ROWS, "task_steps": 1, "safe_steps": 1, "batch_size": 2},
}


class Loop:
    """A trainer: a state, and methods that call."""

    def __init__(self, model):
        self.model, self.state = model, type("State", (), {})()

    def train(self, action, ours=True):
        if ours:
            begin_run(self.model, self.state, Loop.train)
        return action()


def leave(model, name="left", **hooks):
    """Put hooks on that nothing takes off but themselves: what put them there lives as long as the model."""
    context = batch_hooks(model, name)
    put = context.__enter__()
    for when, hook in hooks.items():
        getattr(put, when)(model, hook)
    model.left = context


@pytest.mark.parametrize("name", KINDS)
def test_the_next_training_is_as_if_there_had_been_no_correction(world, chat_tokenizer, tmp_path, name):
    """Without any callback of ours, while the trainer that failed lives on; equal to the bit."""

    def trainer(model, *callbacks):
        return world.trainer(tmp_path, *callbacks, model=model, tokenizer=chat_tokenizer, max_steps=2)

    guard = SafeMergeCallback(corrections=[{name: KINDS[name]}])
    model = world.model(init_lora_weights=False)
    broken = trainer(model, guard)
    compute_loss = broken.compute_loss
    broken.compute_loss = lambda *batch, **more: [compute_loss(*batch, **more)][1]
    with pytest.raises(IndexError):
        broken.train()
    assert hooked(model)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    following = trainer(model)
    assert all(p.requires_grad for key, p in model.named_parameters() if "lora_" in key)
    following.train()
    plain = world.model()
    plain.load_state_dict(start)
    trainer(plain).train()
    want = lora_weights(plain)
    assert all(torch.equal(weight, want[key]) for key, weight in lora_weights(model).items())
    assert not hooked(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_at_home_where_their_trainer_calls():
    model = nn.Sequential(nn.Linear(2, 2))
    calls, x = [], torch.zeros(1, 2)

    def left():
        leave(model, before=lambda *_: calls.append("before"), after=lambda *_: calls.append("after"))
        model(x)
        # A pass on the way back of a device.
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()

    first, second = Loop(model), Loop(model)
    first.train(left)
    assert calls == ["before", "after"] * 2
    assert hooked(model)
    second.train(lambda: model(x), ours=False)
    assert len(calls) == 4
    assert not hooked(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_state_that_is_gone_calls_nobody_and_a_loop_of_ones_own_keeps_its_hooks():
    model, x, calls = nn.Linear(2, 2), torch.zeros(1, 2), []
    loop = Loop(model)
    loop.train(lambda: leave(model, before=lambda *_: calls.append(1)))
    del loop
    gc.collect()
    model(x)
    assert calls == []
    with batch_hooks(model, "a") as hooks:
        hooks.before(model, lambda *_: calls.append(1))
        model(x)
        assert hooked(model)
    assert calls == [1]
    assert not hooked(model)


def test_who_begins_takes_off_what_is_of_others_alone():
    model, loop = nn.Linear(2, 2), Loop(nn.Linear(2, 2))
    leave(model)

    def begin():
        begin_run(model, loop.state, Loop.train)
        assert not hooked(model)
        leave(model, "ours")
        begin_run(model, loop.state, Loop.train)
        return hooked(model)

    assert loop.train(begin)
    unhook(model)
    assert not hooked(model)


def test_a_model_with_hooks_left_is_let_go():
    def failed_training():
        model = nn.Linear(2, 2)
        Loop(model).train(lambda: leave(model, before=print))
        return ref(model)

    gone = failed_training()
    gc.collect()
    assert gone() is None
