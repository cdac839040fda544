"""`cross_entropy`: the merged model gives the responses that task rows and safety rows have."""

from __future__ import annotations

from torch import Tensor

from ..reference import ReferenceRows
from ..row_batch import RowBatch, RowOutputs, mean_of_targets, target_losses
from .registry import objective


@objective(responses=True)
def cross_entropy(outputs: RowOutputs, batch: RowBatch, _reference: ReferenceRows | None) -> Tensor:
    """Return each row's mean of -log p(target) over its response's tokens, (n,), in nats.

    Source: One Bad Model Spoils the Bunch, arXiv:2406.14563. Differs: means over the rows of each kind, where the paper
    sums, so that the share of safety is μ and not the number of rows; and the responses are the user's or the aligned
    model's own, where its released pipeline lets the unsafe expert answer both sets.
    """
    return mean_of_targets(target_losses(outputs.logits, batch), batch)
