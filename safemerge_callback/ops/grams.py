"""Gram matrices of a module's inputs as factors, G = Xᵀ·X, and the regression between two of them: never d_in × d_in.

n rows of inputs, d numbers each: what is computed is n × n or smaller, in float64 (float32 on devices that have none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import PlanError, shown
from .lowrank import wide_dtype
from .shapes import Float, Tensor


class Grams(NamedTuple):
    """The Grams of a module's inputs on the task's rows and on safety rows: Xᵀ·X of factors (*n, rows, d_in) each.

    A factor's rows are inputs over the root of their number, so that Xᵀ·X is a mean; rows of zeros count for nothing.
    """

    task: Tensor
    safety: Tensor


def gram_cosine(grams: Grams) -> Float[Tensor, "*n"]:
    """Return ⟨G_f, G_s⟩/(‖G_f‖·‖G_s‖), in [0, 1], (*n): 1 where they agree but for a factor; NaN where one is 0."""
    X, Y = (factor.to(wide_dtype(factor.device)) for factor in grams)
    inner, of_task, of_safety = ((a @ b.mT).square().sum((-2, -1)) for a, b in ((X, Y), (X, X), (Y, Y)))
    return (inner / (of_task * of_safety).sqrt()).clamp(max=1.0)


def unused_features(factor: Tensor) -> Float[Tensor, "*n"]:
    """Return how many of the d_in inputs are 0 in every row, (*n), as a float."""
    return (factor == 0).all(-2).sum(-1).to(torch.float32)


@dataclass(frozen=True)
class Regression:
    """What maps each expert's A to its part of the regression's: A·G·M⁻¹ with M = G_f + μ·G_s + ε·I.

    With off-diagonals of both Grams times `alpha`, G = alpha·Xᵀ·X + (1 - alpha)·diag(Xᵀ·X), M is a diagonal D plus Zᵀ·Z
    of the stacked factors Z, and by Woodbury's identity M⁻¹ = D⁻¹ - D⁻¹·Zᵀ·(I + Z·D⁻¹·Zᵀ)⁻¹·Z·D⁻¹. ε is `ridge` times
    the mean of G_f's diagonal, and counts as a part of G_f: features that the task never used are kept as they are
    where safety rows do not use them either. Rounding grows as μ/ridge: 5e-6 of A at 1e9. Made by `regression`.
    """

    safety: Tensor
    safety_diagonal: Tensor
    mu: float
    alpha: float
    diagonal: Tensor
    stacked: Tensor
    cholesky: Tensor

    def task_part(self, A: Tensor) -> Tensor:
        """Return A·(G_f + ε·I)·M⁻¹ = A - A·μ·G_s·M⁻¹ of A (*n, r, d), in float64."""
        A = A.to(self.safety.dtype)
        return A - self._solved(self._weighed(A))

    def safety_part(self, A: Tensor) -> Tensor:
        """Return A·μ·G_s·M⁻¹ of A (*n, r, d), in float64."""
        return self._solved(self._weighed(A.to(self.safety.dtype)))

    def _weighed(self, A: Tensor) -> Tensor:
        """A·μ·G_s."""
        whole = self.alpha * ((A @ self.safety.mT) @ self.safety)
        return self.mu * (whole + (1 - self.alpha) * A * self.safety_diagonal[..., None, :])

    def _solved(self, rows: Tensor) -> Tensor:
        """rows·M⁻¹."""
        scaled = rows / self.diagonal[..., None, :]
        inner = torch.cholesky_solve((scaled @ self.stacked.mT).mT, self.cholesky)
        return scaled - (inner.mT @ self.stacked) / self.diagonal[..., None, :]


def regression(grams: Grams, *, mu: float, ridge: float, alpha: float = 1.0) -> Regression:
    """Return the regression of two experts on the inputs of the task and of safety rows, Grams (*n, rows, d).

    Source: RegMean, arXiv:2212.09849, equation of its closed form, with its scaling of off-diagonals. Differs: ridge in
    place of an inverse of what may be singular, Grams are means, and factors stand for them. Where the task's Gram is 0
    the result is not finite. PlanError for a ridge that is not above 0.
    """
    if not ridge > 0:
        raise PlanError(f"ridge is {shown(ridge)}, and a Gram of few rows is singular without one: give one above 0")
    X, Y = (factor.to(wide_dtype(factor.device)) for factor in grams)
    of_task, of_safety = X.square().sum(-2), Y.square().sum(-2)
    level = ridge * of_task.mean(-1, keepdim=True)
    diagonal = level + (1 - alpha) * (of_task + mu * of_safety)
    Z = torch.cat([alpha**0.5 * X, (alpha * mu) ** 0.5 * Y], dim=-2)
    inner = (Z / diagonal[..., None, :]) @ Z.mT
    inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return Regression(Y, of_safety, mu, alpha, diagonal, Z, torch.linalg.cholesky_ex(inner).L)
