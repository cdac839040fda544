"""The trainer's own batches teach nothing for a while: loss, logs and metrics are as ever, the gradient is zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..live.batch_hooks import batch_hooks
from ..live.faults import Fault


@contextmanager
def stopped_batches(model: nn.Module) -> Iterator[list[Fault]]:
    """Within, whatever is made of what the model puts out has a gradient of zero; yields nothing that went wrong.

    Every pass is computed as ever, forward and backward: an engine that counts on a gradient of each parameter gets it.
    """
    with batch_hooks(model, "stopped_batches") as hooks:
        hooks.after(model, _stop)
        yield []


def _stop(_module: nn.Module, _args: tuple[Any, ...], outputs: Any) -> None:
    for tensor in tree_leaves(outputs):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            # No product with 0, which leaves NaN what it is.
            tensor.register_hook(torch.zeros_like)
