"""`ce`: the cross-entropy of the responses, as in supervised fine-tuning."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from ...signals.reference import Reference, ReferenceRows
from ...signals.row_batch import RowBatch, RowOutputs
from .registry import row_loss


def ce_spread(reference: Reference) -> tuple[float, float]:
    """Return the mean and the standard deviation over the rows of the reference's own cross-entropy."""
    losses = [row.loss for row in reference]
    return statistics.fmean(losses), statistics.pstdev(losses)


@row_loss(ce_spread)
def ce(outputs: RowOutputs, batch: RowBatch, _reference: ReferenceRows) -> Tensor:
    """Return each row's mean of -log p(target) over its response's tokens, (n,), float32, in nats.

    Source: SafeInstruct, Bianchi et al., arXiv:2309.07875. Differs: the rows come in a pass of their own beside the
    task's batch, not in it.
    """
    log_probs = outputs.logits.log_softmax(-1)
    chosen = log_probs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    return -mean_over(chosen, batch.mask)


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (n,) of values (n, t) where the mask is true."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)
