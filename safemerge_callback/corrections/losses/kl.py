"""`kl`: the divergence of the live model's next tokens from the reference's, along the reference's own responses."""

from __future__ import annotations

from torch import Tensor

from ...signals.divergence import divergences
from ...signals.reference import Reference, ReferenceRows
from ...signals.row_batch import RowBatch, RowOutputs, mean_of_targets
from .ce import ce_spread
from .registry import row_loss


def _spread(reference: Reference) -> tuple[float, float]:
    """0 where the model is the reference. Along its likeliest tokens KL is about the rise of the cross-entropy."""
    return 0.0, ce_spread(reference)[1]


@row_loss(_spread, log_probs=True)
def kl(outputs: RowOutputs, batch: RowBatch, reference: ReferenceRows | None) -> Tensor:
    """Return each row's mean of KL(reference ‖ live) over its response's tokens, (n,), float32, in nats.

    Over the tokens that the reference holds and one bin of all others; over all where it holds all.

    Source: the alignment loss of SafeGrad, arXiv:2508.07172. Differs: its released code sums over prompt and padding
    too, in the model's dtype; here the response's tokens alone count, in float32, and the reference's
    log-probabilities are taken once, so that no second forward pass is paid.
    """
    assert reference is not None, "this loss asks for log-probabilities"
    return mean_of_targets(divergences(outputs.logits, reference), batch)
