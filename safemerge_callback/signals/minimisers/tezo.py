"""`tezo`: zeroth order along low-rank directions; two forward passes a step and no backward pass at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .registry import Effort, Problem, minimiser

_RATE, _BETAS, _EPSILON = 0.05, (0.9, 0.99), 1e-8
# How far a probe goes, and of how many parts a direction is made at most.
_REACH, _RANK = 0.05, 8


class Directions:
    """Directions of one low-rank family: Z = U·diag(τ)·Vᵀ/√r with U (rows, r) and V (columns, r) drawn once, normal.

    Over U, V and τ, all standard normal, E[vec Z·vec Zᵀ] is the identity, so that the difference quotient along Z,
    times Z, has the gradient for its mean.
    """

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        self.rank, self._generator = rank, generator
        self._U, self._V = (torch.randn(n, rank, dtype=torch.float64, generator=generator) for n in shape)

    def draw(self) -> Tensor:
        """Return a τ, (r)."""
        return torch.randn(self.rank, dtype=torch.float64, generator=self._generator)

    def along(self, tau: Tensor) -> Tensor:
        """Return Z of a τ, by row, (rows·columns)."""
        return ((self._U * tau) @ self._V.T).flatten() / math.sqrt(self.rank)


@minimiser(48)
def tezo(problem: Problem, effort: Effort) -> None:
    """Step along directions that share U and V over time, so that Adam's state is r numbers.

    Source: TeZO, arXiv:2501.19057, on a matrix of coefficients (modules of a layer × layers) where it has weights.
    Differs: the pair of probes sees the same rows, and Adam's second moment is τ's own, where the paper keeps its
    separable part; a point beyond a border is put on it after the step. A pair that is no number is left out.
    """
    generator = torch.Generator().manual_seed(effort.seed)
    directions = Directions(problem.shape, min(_RANK, len(problem.start)), generator)
    point = torch.tensor([*problem.start], dtype=torch.float64)
    mean, square = torch.zeros(directions.rank).double(), torch.zeros(directions.rank).double()
    steps = max(1, effort.evaluations // 2)
    for step in range(1, steps + 1):
        tau = directions.draw()
        probe = _REACH * directions.along(tau)
        higher, lower = (problem.loss((point + way * probe).tolist(), batch=step - 1) for way in (1, -1))
        slope = (higher - lower) / (2 * _REACH) * tau
        if not bool(torch.isfinite(slope).all()):
            continue
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * slope
        square = _BETAS[1] * square + (1 - _BETAS[1]) * slope.square()
        move = mean / (1 - _BETAS[0] ** step) / ((square / (1 - _BETAS[1] ** step)).sqrt() + _EPSILON)
        rate = _RATE * (1 - (step - 1) / steps)
        point = (point - rate * directions.along(move)).clamp(0.0, 1.0)
    problem.loss(point.tolist())
