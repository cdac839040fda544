"""`ce`: the cross-entropy of the responses, as in supervised fine-tuning."""

from __future__ import annotations

import statistics

from torch import Tensor

from ...signals.reference import Reference, ReferenceRows
from ...signals.row_batch import RowBatch, RowOutputs, mean_of_targets, target_losses
from .registry import row_loss


def ce_spread(reference: Reference) -> tuple[float, float]:
    """Return the mean and the standard deviation over the rows of the reference's own cross-entropy."""
    losses = [row.loss for row in reference]
    return statistics.fmean(losses), statistics.pstdev(losses)


@row_loss(ce_spread)
def ce(outputs: RowOutputs, batch: RowBatch, _reference: ReferenceRows | None) -> Tensor:
    """Return each row's mean of -log p(target) over its response's tokens, (n,), float32, in nats.

    Source: SafeInstruct, Bianchi et al., arXiv:2309.07875. Differs: the rows come in a pass of their own beside the
    task's batch, not in it.
    """
    return mean_of_targets(target_losses(outputs.logits, batch), batch)
