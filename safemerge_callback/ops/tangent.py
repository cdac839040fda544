"""How large a gradient is as far as an update of rank r can follow it, whatever its two factors are."""

from __future__ import annotations

import torch

from .lowrank import LowRank, wide_dtype
from .shapes import Float, Tensor

# Directions of a factor below 1e-5 of its largest are rounding: what a gradient has along them is not known.
LEAST_SQUARE = 1e-10


def tangent_products(update: LowRank, gradient: LowRank) -> Float[Tensor, "5 r r"]:
    """Return what `tangent_norms` needs of an update B·A and of the gradients by A and by B, which `gradient` holds.

    A·Aᵀ, BᵀB, ∂A·∂Aᵀ, ∂Bᵀ∂B and Bᵀ∂B, in `wide_dtype`, on the update's device.
    """
    wide = wide_dtype(update.A.device)
    A, B, by_A, by_B = (x.to(wide) for x in (update.A, update.B, gradient.A, gradient.B))
    return torch.stack([A @ A.mT, B.mT @ B, by_A @ by_A.mT, by_B.mT @ by_B, B.mT @ by_B])


def tangent_norms(products: Float[Tensor, "*n 5 r r"], scaling: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return the norms of G = ∂L/∂ΔW projected on the directions in which s·B·A can move at rank r, for n modules.

    ‖P_B·G‖² + ‖G·P_A‖² - ‖P_B·G·P_A‖², with P_A and P_B on the rows of A and the columns of B. Since ∂A = s·Bᵀ·G and
    ∂B = s·G·Aᵀ, only r × r matrices are needed. Factors (M⁻¹·A, B·M) give the same, where the norms of ∂A and ∂B do
    not; with B = 0 it is ‖G·P_A‖.
    """
    on_A, on_B = (torch.linalg.pinv(products[..., i, :, :], hermitian=True, rtol=LEAST_SQUARE) for i in (0, 1))
    columns, rows = (on_B * products[..., 2, :, :]).sum((-2, -1)), (on_A * products[..., 3, :, :]).sum((-2, -1))
    both = products[..., 4, :, :]
    twice = ((on_B @ both) * (both @ on_A)).sum((-2, -1))
    return (columns + rows - twice).clamp_min(0.0).sqrt() / scaling.abs()
