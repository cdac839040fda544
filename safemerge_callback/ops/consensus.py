"""Whose sign counts where updates disagree, and the mean of those that agree. PEFT's conventions throughout.

Shapes: `updates` is (k, *n, rows, columns), the k updates stacked on the first dimension.
"""

from __future__ import annotations

import torch

from .shapes import Float, Tensor

SIGN_METHODS = ("total", "frequency")


def elected(
    updates: Float[Tensor, "k *n rows columns"], majority_sign_method: str = "total"
) -> Float[Tensor, "k *n rows columns"]:
    """Return 1 where an update's entry has the elected sign and 0 elsewhere, in the dtype of `updates`.

    `total` elects the sign of the sum, `frequency` the sign that most updates have; a tie is positive; an entry of 0
    never has it. Source: TIES (Yadav et al. 2023, arXiv:2306.01708) as PEFT's `calculate_majority_sign_mask`,
    which elects before it weights. Differs from mergekit, where the weighted updates vote.
    """
    signs = updates.sign()
    votes = (updates if majority_sign_method == "total" else signs).sum(0)
    majority = torch.where(votes >= 0, 1.0, -1.0).to(updates.dtype)
    return (signs == majority).to(updates.dtype)


def disjoint_mean(
    weighted: Float[Tensor, "k *n rows columns"], agreeing: Float[Tensor, "k *n rows columns"]
) -> Float[Tensor, "*n rows columns"]:
    """Return at each entry the sum of the agreeing updates over their number; 0 where none agrees.

    Source: TIES, as PEFT's `disjoint_merge`: the number is a count, and not the sum of the weights as in mergekit
    with `normalize`. So weights of 1 give the mean, and weights that sum to 1 give a k-th of the weighted mean where
    all k agree.
    """
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp_min(1.0)


def balances(updates: Float[Tensor, "k *n rows columns"]) -> Float[Tensor, "k *n rows columns"]:
    """Return how much each entry of each update counts: its own importance times its agreement with all k.

    Source: PCB-Merging (Du et al. 2024, arXiv:2410.02396): Softmax(k·Norm(x∘x)) ∘ Σⱼ Softmax(Norm(x∘xⱼ)), with Norm
    the min-max over a matrix. Every softmax is multiplied by the number of entries, so that balances are of the order
    of 1 and not of its inverse square: their ratios are what is used.
    """
    count = updates.shape[0]
    intra = _softmax(count * _normed(updates * updates))
    inter = sum(_softmax(_normed(updates * other)) for other in updates)
    return intra * inter


def _normed(tensor: Tensor) -> Tensor:
    """Min-max over the last two dimensions; 0 where all entries are equal."""
    low, high = tensor.amin((-2, -1), keepdim=True), tensor.amax((-2, -1), keepdim=True)
    return (tensor - low) / torch.where(high > low, high - low, torch.ones_like(high))


def _softmax(tensor: Tensor) -> Tensor:
    """Softmax over the last two dimensions, times their number of entries."""
    flat = tensor.flatten(-2)
    return (flat.softmax(-1) * flat.shape[-1]).view_as(tensor)
