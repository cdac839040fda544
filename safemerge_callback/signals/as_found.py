"""Whatever happens inside, training goes on as if nothing had."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .responses import evaluating


@contextmanager
def left_as_found(model: Any, tokenizer: Any = None) -> Iterator[None]:
    """Evaluate within, without gradients; then put back the random states, each module's mode, and the padding side.

    The random states are those of python, numpy, torch on the CPU, and torch on the devices that hold the model.
    """
    import torch

    put_back = _random_states(model)
    side = getattr(tokenizer, "padding_side", None)
    try:
        with torch.no_grad(), evaluating(model):
            yield
    finally:
        for action in put_back:
            action()
        if side is not None:
            tokenizer.padding_side = side


@contextmanager
def random_states_kept(model: Any) -> Iterator[None]:
    """Put the random states back afterwards, as `left_as_found`, and nothing else."""
    put_back = _random_states(model)
    try:
        yield
    finally:
        for action in put_back:
            action()


def _random_states(model: Any) -> list[Callable[[], None]]:
    """What puts each random state back as it is now."""
    import torch

    found: list[Callable[[], None]] = [
        partial(random.setstate, random.getstate()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if numpy := sys.modules.get("numpy"):
        found.append(partial(numpy.random.set_state, numpy.random.get_state()))
    for device in {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}:
        module = torch.get_device_module(device)
        # Apple's has one device, and takes none as an argument.
        which = () if device.type == "mps" else (device,)
        found.append(partial(module.set_rng_state, module.get_rng_state(*which), *which))
    return found
