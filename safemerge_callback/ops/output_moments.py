"""How large a module's outputs are, channel by channel, before and after a merge: a gauge of it, and a rescale of B.

Source: TACT, "non-local merging", arXiv:2410.12766: y ← (y - mean_merged)/std_merged·std_expert + mean_expert for every
channel and task, against outputs that a merge has made too small. Differs: the scale is put into B once, so that the
result is a plain LoRA and nobody need know the task at inference; the shift of the mean, which would be a bias, is left
out. No public code was found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .lowrank import LowRank, wide_dtype
from .shapes import Float, Tensor

# Beyond this factor a channel is not made larger or smaller: it hardly had an output.
LARGEST_RESCALE = 10.0


class OutputMoments(NamedTuple):
    """Of a module's outputs over the rows of its inputs: `mean` and standard deviation `std`, each (*n, d_out)."""

    mean: Tensor
    std: Tensor


def output_moments(
    update: LowRank,
    inputs: Float[Tensor, "*n t d_in"],
    weight: Float[Tensor, "*n d_out d_in"] | None = None,
    *,
    centred: bool = True,
) -> OutputMoments:
    """Return the moments of (W + B·A)·x over the rows x of `inputs`, those of B·A·x alone where no weight is given.

    Alone, they come from the r × r covariance of A·x, and nothing of t × d_out is formed; with the base weight they are
    taken of the outputs themselves, t × d_out. In float64, as `wide_dtype`; the deviation is the population's. Without
    `centred` it is from 0, the root mean square: so `inputs` may be any factor of the inputs' Gram matrix, of which the
    rows are no inputs, up to one number for all channels.
    """
    wide = wide_dtype(update.A.device)
    X, B = inputs.to(wide), update.B.to(wide)
    small = X @ update.A.to(wide).mT
    if weight is not None:
        outputs = X @ weight.to(wide).mT + small @ B.mT
        centre = outputs.mean(-2, keepdim=True) if centred else torch.zeros_like(outputs[..., :1, :])
        return OutputMoments(centre.squeeze(-2), (outputs - centre).square().mean(-2).sqrt())
    centre = small.mean(-2, keepdim=True) if centred else torch.zeros_like(small[..., :1, :])
    spread = small - centre
    covariance = spread.mT @ spread / X.shape[-2]
    variance = ((B @ covariance) * B).sum(-1)
    return OutputMoments((centre @ B.mT).squeeze(-2), variance.clamp_min(0.0).sqrt())


def output_ratio(
    merged: LowRank,
    expert: LowRank,
    inputs: Float[Tensor, "*n t d_in"],
    weight: Float[Tensor, "*n d_out d_in"] | None = None,
    *,
    centred: bool = True,
) -> Float[Tensor, "*n"]:
    """Return ‖std merged‖/‖std expert‖ over a module's channels, (*n): 1 where the merge left its outputs as large.

    1 where both are 0, infinite where only the expert's are. `weight`: that of the base, of which outputs are all but
    the update's share, so that the ratio is near 1 whatever was merged: without it the update's own is told. `centred`
    as `output_moments`.
    """
    after = torch.linalg.vector_norm(output_moments(merged, inputs, weight, centred=centred).std, dim=-1)
    before = torch.linalg.vector_norm(output_moments(expert, inputs, weight, centred=centred).std, dim=-1)
    return torch.where(after == before, torch.ones_like(after), after / before)


def rescaled_outputs(
    merged: LowRank, expert: LowRank, inputs: Float[Tensor, "*n t d_in"], largest: float = LARGEST_RESCALE
) -> LowRank:
    """Return `merged` with every row of B times std_expert/std_merged of its channel: A and the rank stay.

    The factor is at most `largest` and at least its inverse, and 1 where merged has no output. Of an update that was
    only made smaller this is the expert again: a `pull` it takes back whole. Its dtype is that of B.
    """
    after, before = output_moments(merged, inputs).std, output_moments(expert, inputs).std
    factor = torch.where(after > 0, before / after, torch.ones_like(after)).clamp(1.0 / largest, largest)
    return LowRank(merged.A, (merged.B.to(factor.dtype) * factor[..., None]).to(merged.B.dtype))
