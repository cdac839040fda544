"""`gradient`: Adam on the coefficients themselves, projected on [0, 1]; a forward and a backward pass a step."""

from __future__ import annotations

import math

import torch

from .registry import Effort, Problem, minimiser

_RATE, _BETAS, _EPSILON = 0.1, (0.9, 0.99), 1e-8


@minimiser(10, backward=True)
def gradient(problem: Problem, effort: Effort) -> None:
    """Take a step on each batch in turn, of 0.1 at first and falling to nothing, then ask all rows at where it ends.

    Source: AdaMerging's Adam (arXiv:2310.02575: rate 1e-3, 500 epochs of two batches a task). Differs: fewer and larger
    steps, since a step on [0, 1] need not be small; and a point beyond a border is put on it after the step, where its
    gradient is that of the border, while the release clamps inside the loss and has none there. It stops at a gradient
    that is not finite.
    """
    point = torch.tensor([*problem.start], dtype=torch.float64)
    mean, square = torch.zeros_like(point), torch.zeros_like(point)
    for step in range(1, effort.evaluations + 1):
        loss, slopes = problem.gradient(point.tolist(), batch=step - 1)
        slope = torch.tensor(slopes, dtype=torch.float64)
        if not math.isfinite(loss) or not bool(torch.isfinite(slope).all()):
            break
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * slope
        square = _BETAS[1] * square + (1 - _BETAS[1]) * slope.square()
        move = mean / (1 - _BETAS[0] ** step) / ((square / (1 - _BETAS[1] ** step)).sqrt() + _EPSILON)
        rate = _RATE * (1 - (step - 1) / effort.evaluations)
        point = (point - rate * move).clamp(0.0, 1.0)
    problem.loss(point.tolist())
