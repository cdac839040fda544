"""Two gradients into one: what of the task's goes against the safety rows' is taken away, and that one is bounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def without_conflict(task: Sequence[Tensor], safety: Sequence[Tensor]) -> list[Tensor]:
    """Return the task's gradient without its part against the safety gradient, both one tensor a parameter.

    g - min(0, ⟨g, h⟩)/‖h‖²·h, with one inner product over all parameters, float32, on the device; g where h is 0.

    Source: SafeGrad, arXiv:2508.07172, equation of its surgery. Differs: its released code leaves g alone where ‖h‖² is
    below 1e-9, which a large model's gradient is once it has hardly drifted, and its conflict is then not seen; here h
    is scaled by its largest entry first, so that the result is the equation's at any size.
    """
    unit, _ = _scaled(safety)
    inner, size = _inner(task, unit).clamp(max=0.0), _inner(unit, unit)
    share = torch.where(size > 0, inner / size, 0.0)
    return [(g.float() - share.to(g.device) * h).to(g.dtype) for g, h in zip(task, unit, strict=True)]


def bounded(safety: Sequence[Tensor], task: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return the safety gradient with at most `share` of the norm of the task's, at any size of either."""
    most, norm = share * _norm(task), _norm(safety)
    factor = torch.where(norm > most, most / norm, 1.0)
    return [h * factor.to(h.device, h.dtype) for h in safety]


def _norm(vector: Sequence[Tensor]) -> Tensor:
    unit, largest = _scaled(vector)
    return largest * _inner(unit, unit).sqrt()


def _scaled(vector: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The tensors, float32, divided by the largest entry of all, and that entry; as they are where all are 0.

    A square of them neither vanishes nor overflows then.
    """
    sizes = [tensor.abs().amax().float() for tensor in vector if tensor.numel()]
    largest = torch.stack([size.to(sizes[0].device) for size in sizes]).amax()
    by = torch.where(largest > 0, largest, 1.0)
    return [tensor.float() / by.to(tensor.device) for tensor in vector], largest


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    products = [(a.float() * b.float()).sum() for a, b in zip(one, other, strict=True)]
    return torch.stack([product.to(products[0].device) for product in products]).sum()
