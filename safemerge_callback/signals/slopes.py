"""How much each module's update costs on rows, to first order; cost: one forward and backward pass over the rows.

The slope of a module is ⟨ΔW, ∂L/∂ΔW⟩, what the mean loss L of the rows' responses gains per unit by which the module's
update grows. With ΔW = s·B·A it is ⟨B, ∂L/∂B⟩: a gradient of B alone is taken, and no d_out × d_in matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops import wide_dtype
from .check_data import CheckData
from .model_state import preserve_state
from .responses import alike_lengths
from .row_batch import mean_of_targets, row_batch, row_outputs, target_losses
from .rows import RowTokens

# Where a rank has each B whole, and its gradient can be taken without the engine.
SLOPE_ENGINES = ("one process", "DDP")


def module_slopes(data: CheckData, rows: Sequence[RowTokens], batch_size: int = 8) -> dict[str, float]:
    """Return each module's ⟨B, ∂L/∂B⟩ for the mean cross-entropy L of the rows' responses, in nats a token.

    The loss is the mean over rows of the mean over a row's tokens, float32; inner products are summed in float64. The
    model is left as it was: gradients are returned, and none is added to `.grad`, so that no engine hears of it.
    """
    factors = [module.B.tensor for module in data.modules.values()]
    total = torch.zeros(len(factors), dtype=torch.float64)
    for gradients in row_gradients(data, rows, factors, batch_size):
        total += torch.stack([_inner(*pair) for pair in zip(factors, gradients, strict=True)]).cpu()
    return dict(zip(data.modules, total.tolist(), strict=True))


def row_gradients(
    data: CheckData, rows: Sequence[RowTokens], factors: Sequence[Tensor], batch_size: int
) -> Iterator[Sequence[Tensor]]:
    """Yield what each batch of the rows adds to the gradient of their mean loss by these factors.

    One forward and backward pass a batch, within `preserve_state`: none is added to `.grad`.
    """
    for places in alike_lengths([len(row.prompt) + len(row.response) for row in rows], batch_size):
        with preserve_state(data.model, gradients=True):
            for factor in factors:
                factor.requires_grad_(True)
            batch = row_batch([rows[i] for i in places], factors[0].device)
            losses = mean_of_targets(target_losses(row_outputs(data.model, batch).logits, batch), batch)
            gradients = torch.autograd.grad(losses.sum() / len(rows), factors)
        yield gradients


def _inner(factor: Tensor, gradient: Tensor) -> Tensor:
    wide = wide_dtype(factor.device)
    return (factor.detach().to(wide) * gradient.to(wide)).sum()
