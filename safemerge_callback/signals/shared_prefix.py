"""Rows that begin alike, as in one chat template with one instruction, pay for their common beginning once a batch.

Cost: a forward pass of one row's beginning, and one of the batch's ends behind it. With gradients, too: they go through
the keys and values that the beginning leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..live.forward import forward_keywords
from ..ops import accumulation_dtype
from .divergence import divergences
from .greedy import common_length
from .reference import ReferenceRows
from .row_batch import RowBatch, RowOutputs, mean_of_targets, row_batch, row_outputs
from .rows import RowTokens

# Shorter beginnings are not worth a pass of their own.
_LEAST = 8
# Up to this divergence, in nats, both ways say the same; a cache that is no list of keys and values is far beyond.
_SAME = 1e-2
_NEEDED = frozenset({"past_key_values", "use_cache", "position_ids", "logits_to_keep"})


def prefix_length(model: nn.Module, rows: Sequence[RowTokens]) -> int:
    """Return how many tokens all prompts begin with alike; 0 where that is too few, or the model keeps no cache.

    A token of each prompt is left behind it.
    """
    if len(rows) < 2 or not forward_keywords(model) >= _NEEDED:
        return 0
    length = common_length([row.prompt for row in rows])
    return length if length >= _LEAST else 0


def prefixed_outputs(
    model: nn.Module, rows: Sequence[RowTokens], length: int, device: torch.device | str
) -> tuple[RowOutputs, RowBatch]:
    """Return what `row_outputs` does of rows whose prompts begin with the same `length` tokens, and their targets."""
    batch = row_batch([row._replace(prompt=row.prompt[length:]) for row in rows], device)
    beginning = torch.tensor([rows[0].prompt[:length]], device=device)
    cache: Any = model(
        input_ids=beginning, attention_mask=torch.ones_like(beginning), use_cache=True, logits_to_keep=1
    ).past_key_values
    cache.batch_repeat_interleave(len(rows))
    mask = torch.cat([batch.attention_mask.new_ones(len(rows), length), batch.attention_mask], 1)
    inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": batch.targets.shape[1]}
    places = (length + batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=places, **inputs).logits
    logits = logits[:, -batch.targets.shape[1] :]
    return RowOutputs(logits.to(accumulation_dtype(logits)), None), batch


def prefix_agrees(model: nn.Module, rows: Sequence[RowTokens], length: int, device: torch.device | str) -> bool:
    """Return whether the model says the same behind a common beginning as of whole rows: asked of it once.

    A model whose cache is something else than keys and values may not, and may refuse.
    """
    whole = row_batch(rows, device)
    with torch.no_grad():
        try:
            outputs, _ = prefixed_outputs(model, rows, length, device)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False
        reference = ReferenceRows(row_outputs(model, whole).logits.log_softmax(-1), None, None, None)
        return bool((mean_of_targets(divergences(outputs.logits, reference), whole) < _SAME).all())
