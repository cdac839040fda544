"""Safety rows through a live model: what it says at each place of the responses that it is to keep giving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..live.forward import forward_keywords
from ..ops import accumulation_dtype
from .rows import RowTokens


class RowBatch(NamedTuple):
    """Rows (n) ending at one place, padded on the left: prompt, then response but for its last token, `length` in all.

    `input_ids` and `attention_mask` (n, length), int64. `targets` (n, t) int64 are the responses' tokens, t of the
    longest, right-aligned; `mask` (n, t) bool tells them from padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    mask: Tensor


class RowOutputs(NamedTuple):
    """`logits` (n, t, vocabulary) for each of a batch's targets; `hidden` (n, d), or None.

    Both float32, or float64 where the model computes in it.

    `hidden` is the last hidden state, after the model's last norm, at each prompt's last token.
    """

    logits: Tensor
    hidden: Tensor | None


def row_batch(rows: Sequence[RowTokens], device: torch.device | str = "cpu") -> RowBatch:
    """Return rows as one batch on a device; ValueError for none, and for an empty prompt or response."""
    if not rows or not all(row.prompt and row.response for row in rows):
        raise ValueError(f"{len(rows)} rows, of which each must have tokens in its prompt and its response")
    sequences = [[*row.prompt, *row.response[:-1]] for row in rows]
    length, longest = max(map(len, sequences)), max(len(row.response) for row in rows)
    return RowBatch(
        _right_aligned(sequences, length, device),
        _right_aligned([[1] * len(sequence) for sequence in sequences], length, device),
        _right_aligned([row.response for row in rows], longest, device),
        _right_aligned([[1] * len(row.response) for row in rows], longest, device).bool(),
    )


def row_outputs(model: nn.Module, batch: RowBatch, *, hidden: bool = False) -> RowOutputs:
    """Return what the model says of each target of a batch: one forward pass.

    `model` may be wrapped by an engine. Only the places of the targets are put through the head where the model can do
    so (`logits_to_keep`). With `hidden` all layers' states are kept during the pass.
    """
    wanted = batch.targets.shape[1]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    names = forward_keywords(model)
    if "position_ids" in names:
        inputs["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in names:
        inputs["logits_to_keep"] = wanted
    if "use_cache" in names:
        inputs["use_cache"] = False
    if hidden:
        inputs["output_hidden_states"] = True
    outputs = model(**inputs)
    states = _at_prompts_end(outputs.hidden_states[-1], batch.mask) if hidden else None
    logits = outputs.logits[:, -wanted:]
    return RowOutputs(logits.to(accumulation_dtype(logits)), states)


def target_losses(logits: Tensor, batch: RowBatch) -> Tensor:
    """Return -log p of each target, (n, t), float32, in nats; what stands at padding means nothing."""
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")


def mean_of_targets(values: Tensor, batch: RowBatch) -> Tensor:
    """Return each row's mean (n,) of values (n, t) over its targets."""
    return torch.where(batch.mask, values, 0.0).sum(-1) / batch.mask.sum(-1)


def _at_prompts_end(states: Tensor, mask: Tensor) -> Tensor:
    """The states (n, length, d) at each prompt's last token: right before what predicts the response's second."""
    places = states.shape[1] - mask.sum(-1)
    return states[torch.arange(len(states), device=states.device), places].to(accumulation_dtype(states))


def _right_aligned(rows: Sequence[Sequence[int]], length: int, device: torch.device | str) -> Tensor:
    return torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device)
