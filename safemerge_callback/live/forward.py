"""How a live model is run: in the middle of its training, and what its forward pass takes.

Apart from who asks it, since engines are known on this floor.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .modules import is_dtensor
from .ranks import all_or_none, everyones, many, rank
from .writers.fsdp1 import is_fsdp1

Answer = TypeVar("Answer")


@contextmanager
def able_to_generate(model: Any) -> Iterator[bool]:
    """Within, `model.generate` works; yields whether every rank must run as many forward passes as the others.

    It must where a forward pass gathers parameters from all ranks: FSDP1, FSDP2 and ZeRO-3, which go on doing so layer
    by layer here, as in an evaluation, so that nobody needs room for the whole model. What `generate` bypasses is the
    forward pass of FSDP's root, so its own parameters are gathered meanwhile. Collective there.

    Source: TRL's `unwrap_model_for_generation`. Differs: ZeRO-3 is left as it is, TRL gathers it whole by default.
    """
    if is_fsdp1(model):
        with _fsdp1_root(model):
            yield many()
    elif _is_fsdp2(model):
        with _fsdp2_root(model):
            yield many()
    else:
        yield many() and any(hasattr(p, "ds_id") or is_dtensor(p) for p in model.parameters())


def answered_by_ranks(
    model: Any, questions: Sequence[Any], answers_to: Callable[[Sequence[Any], bool], list[Answer]]
) -> list[Answer]:
    """Return an answer to each question, on every rank: each rank answers a share of them, within `able_to_generate`.

    That is quicker by their number than all answering the same. `answers_to` is given questions and whether ranks must
    run in step, each then having as many as the others. Collective; what it raises is raised on every rank.
    """
    ranks = len(everyones(None))
    with able_to_generate(model) as synced:
        share = questions[rank() :: ranks]
        filled = [*share, *questions[:1]] if synced and len(share) < math.ceil(len(questions) / ranks) else share
        answers = all_or_none(lambda: answers_to(filled, synced))
    shares = everyones(answers[: len(share)])
    return [shares[i % ranks][i // ranks] for i in range(len(questions))]


def first_pass(model: Any) -> None:
    """Let FSDP2 see what is trained before anybody puts that off: it looks once, in the first forward pass of its root.

    Where it saw nothing, its mixed precision would know no dtype of a gradient. Without gradients; collective there.
    """
    if _is_fsdp2(model):
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))


@contextmanager
def _fsdp1_root(model: Any) -> Iterator[None]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
        yield


@contextmanager
def _fsdp2_root(model: Any) -> Iterator[None]:
    # Before the first forward pass through the root, a unit beneath it would take itself for the root.
    first_pass(model)
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def _is_fsdp2(model: Any) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(model).__mro__)


def forward_keywords(model: nn.Module) -> frozenset[str]:
    """Return what the innermost model's forward pass takes by name: engines, compilers and PEFT hand all on."""
    inner: Any = model
    while isinstance(deeper := getattr(inner, "module", getattr(inner, "_orig_mod", None)), nn.Module):
        inner = deeper
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return frozenset(inspect.signature(base.forward).parameters)
