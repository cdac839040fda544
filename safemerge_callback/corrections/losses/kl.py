"""`kl`: the divergence of the live model's next tokens from the reference's, along the reference's own responses."""

from __future__ import annotations

import torch
from torch import Tensor

from ...signals.reference import Reference, ReferenceRows
from ...signals.row_batch import RowBatch, RowOutputs, mean_of_targets
from .ce import ce_spread
from .registry import row_loss


def _spread(reference: Reference) -> tuple[float, float]:
    """0 where the model is the reference. Along its likeliest tokens KL is about the rise of the cross-entropy."""
    return 0.0, ce_spread(reference)[1]


@row_loss(_spread)
def kl(outputs: RowOutputs, batch: RowBatch, reference: ReferenceRows) -> Tensor:
    """Return each row's mean of KL(reference ‖ live) over its response's tokens, (n,), float32, in nats.

    Over the tokens that the reference holds and one bin of all others; over all where it holds all.

    Source: the alignment loss of SafeGrad, arXiv:2508.07172. Differs: its released code sums over prompt and padding
    too, in the model's dtype; here the response's tokens alone count, in float32, and the reference's
    log-probabilities are taken once, so that no second forward pass is paid.
    """
    whole = outputs.logits.logsumexp(-1, keepdim=True)
    if reference.tokens is None or reference.rest is None:
        return mean_of_targets(_divergence(reference.log_probs, outputs.logits - whole), batch)
    kept = outputs.logits.gather(-1, reference.tokens) - whole
    others = outputs.logits.scatter(-1, reference.tokens, -torch.inf).logsumexp(-1, keepdim=True) - whole
    binned = torch.cat([reference.log_probs, reference.rest.unsqueeze(-1)], -1)
    return mean_of_targets(_divergence(binned, torch.cat([kept, others], -1)), batch)


def _divergence(reference: Tensor, live: Tensor) -> Tensor:
    """Σ p·(log p - log q) over the last dimension, of logarithms; what has no probability adds nothing."""
    p = reference.exp()
    return torch.where(p > 0, p * (reference - live), 0.0).sum(-1)
