"""How far what a model says next is from what a reference says there; a function of logits, no pass of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ReferenceRows


def divergences(logits: Tensor, reference: ReferenceRows) -> Tensor:
    """Return KL(reference ‖ model) at each place (n, t), in nats, of logits (n, t, vocabulary), in their dtype.

    Over the tokens that the reference holds and one bin of all others; over all where it holds all. The binned one is
    never above the whole one.
    """
    whole = logits.logsumexp(-1, keepdim=True)
    if reference.tokens is None or reference.rest is None:
        return _divergence(reference.log_probs, logits - whole)
    kept = logits.gather(-1, reference.tokens) - whole
    others = logits.scatter(-1, reference.tokens, -torch.inf).logsumexp(-1, keepdim=True) - whole
    binned = torch.cat([reference.log_probs, reference.rest.unsqueeze(-1)], -1)
    return _divergence(binned, torch.cat([kept, others], -1))


def _divergence(reference: Tensor, live: Tensor) -> Tensor:
    """Σ p·(log p - log q) over the last dimension, of logarithms; what has no probability adds nothing."""
    p = reference.exp()
    return torch.where(p > 0, p * (reference - live), 0.0).sum(-1)
