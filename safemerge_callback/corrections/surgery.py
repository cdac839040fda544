"""Two gradients into one: what of the task's goes against the safety rows' is taken away, and that one is bounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def without_conflict(task: Sequence[Tensor], safety: Sequence[Tensor]) -> list[Tensor]:
    """Return the task's gradient without its part against the safety gradient, both one tensor a parameter.

    g - min(0, ⟨g, h⟩)/‖h‖²·h, with one inner product over all parameters, float32, on the device; g where h is 0.

    Source: SafeGrad, arXiv:2508.07172, equation of its surgery; the guard ‖h‖² > 1e-9 is its released code's.
    """
    inner, size = _inner(task, safety), _inner(safety, safety)
    share = torch.where(size > 1e-9, inner.clamp(max=0.0) / size.clamp(min=1e-9), torch.zeros_like(size))
    return [g - share.to(g.dtype) * h for g, h in zip(task, safety, strict=True)]


def bounded(safety: Sequence[Tensor], task: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return the safety gradient with at most `share` of the norm of the task's."""
    most, norm = share * _inner(task, task).sqrt(), _inner(safety, safety).sqrt()
    factor = (most / norm.clamp(min=1e-30)).clamp(max=1.0)
    return [h * factor.to(h.dtype) for h in safety]


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    products = [(a.float() * b.float()).sum() for a, b in zip(one, other, strict=True)]
    return torch.stack([product.to(products[0].device) for product in products]).sum()
