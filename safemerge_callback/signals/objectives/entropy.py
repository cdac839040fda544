"""`entropy`: the merged model is sure of the first token of its response; AdaMerging's objective, a control here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import ReferenceRows
from ..row_batch import RowBatch, RowOutputs
from .registry import objective

_CAUTION = (
    "objective 'entropy' asks a model to be sure, not right: one that answers everything alike is sure, and "
    "an unsafe 'Sure' is as sharp as a refusal. It is AdaMerging's, of classifiers; use 'kl' for what generates"
)


@objective(first=True, caution=_CAUTION)
def entropy(outputs: RowOutputs, batch: RowBatch, _reference: ReferenceRows | None) -> Tensor:
    """Return the entropy -Σ p·log p of what each row's response begins with, (n,), in nats; no labels are read.

    Source: AdaMerging, arXiv:2310.02575. Differs: of the next token after the prompt, where the paper has a
    classifier's classes; on rows that are given for it, where the released code fits on the test images; and without
    its clamp, whose gradient is 0 outside [0, 1].
    """
    first = batch.mask.int().argmax(-1)
    log_probs = outputs.logits[torch.arange(len(first), device=first.device), first].log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
