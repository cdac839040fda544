"""Whatever a signal does to a live model, training goes on as if nothing had happened.

Two laws hold for every signal, and this file is the first of them. A signal changes nothing: what it needs otherwise
(evaluation mode, gradients, padding on one side) goes back when it ends, by an exception too, and so does the random
state. And it says in its first line what it costs, in forward and backward passes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from .responses import evaluating


@contextmanager
def preserve_state(model: Any, tokenizer: Any = None, *, gradients: bool = False) -> Iterator[None]:
    """Evaluate within; then put back the random states, each module's mode, and the padding side.

    The random states are those of python, numpy, torch on the CPU, and torch on the devices that hold the model.
    Without `gradients` none are taken within. With them they are, where the caller takes none, too: every parameter
    begins without a `.grad`, and has its own back afterwards, untouched, and the `requires_grad` that it had.
    """
    import torch

    with ExitStack() as afterwards:
        afterwards.enter_context(preserve_random_states(model))
        if tokenizer is not None and hasattr(tokenizer, "padding_side"):
            afterwards.callback(setattr, tokenizer, "padding_side", tokenizer.padding_side)
        if gradients:
            _set_gradients_aside(model, afterwards)
        with torch.set_grad_enabled(gradients), evaluating(model):
            yield


@contextmanager
def preserve_random_states(model: Any) -> Iterator[None]:
    """Put the random states back afterwards, as `preserve_state`, and nothing else."""
    put_back = _random_states(model)
    try:
        yield
    finally:
        for action in put_back:
            action()


def _random_states(model: Any) -> list[Callable[[], None]]:
    """What puts each random state back as it is now."""
    import torch

    resets: list[Callable[[], None]] = [
        partial(random.setstate, random.getstate()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if numpy := sys.modules.get("numpy"):
        resets.append(partial(numpy.random.set_state, numpy.random.get_state()))
    for device in {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}:
        module = torch.get_device_module(device)
        # Apple's has one device, and takes none as an argument.
        which = () if device.type == "mps" else (device,)
        resets.append(partial(module.set_rng_state, module.get_rng_state(*which), *which))
    return resets


def _set_gradients_aside(model: Any, afterwards: ExitStack) -> None:
    """A backward pass adds to `.grad` in place: what training has gathered there is kept out of its reach."""
    for parameter in model.parameters():
        afterwards.callback(setattr, parameter, "requires_grad", parameter.requires_grad)
        afterwards.callback(setattr, parameter, "grad", parameter.grad)
        parameter.grad = None
