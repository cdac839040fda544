"""How large the gradient of a loss on rows is in each module; cost: one forward and backward pass over the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops import LowRank
from ..ops.tangent import tangent_norms, tangent_products
from .check_data import CheckData
from .rows import RowTokens
from .slopes import row_gradients


def module_gradient_norms(data: CheckData, rows: Sequence[RowTokens], batch_size: int = 8) -> dict[str, float]:
    """Return each module's ‖∂L/∂ΔW‖ as `tangent_norms`, for the mean cross-entropy L of the rows' responses.

    The gradient is that of all rows together, in nats a token by the update. The model is left as it was, as with
    `module_slopes`; one copy of the factors' gradients is kept meanwhile.
    """
    modules = data.modules
    factors = [factor for module in modules.values() for factor in (module.A.tensor, module.B.tensor)]
    totals = [torch.zeros_like(factor) for factor in factors]
    for gradients in row_gradients(data, rows, factors, batch_size):
        torch._foreach_add_(totals, list(gradients))
    updates, gradients_of = (
        [LowRank(x[i].detach(), x[i + 1].detach()) for i in range(0, len(x), 2)] for x in (factors, totals)
    )
    ranks: dict[int, list[int]] = {}
    for place, update in enumerate(updates):
        ranks.setdefault(update.A.shape[0], []).append(place)
    scaling = torch.tensor([module.scaling for module in modules.values()], dtype=torch.float64)
    norms = torch.zeros(len(updates), dtype=torch.float64)
    for places in ranks.values():
        products = torch.stack([tangent_products(updates[i], gradients_of[i]) for i in places])
        norms[places] = tangent_norms(products.cpu().double(), scaling[places])
    return dict(zip(modules, norms.tolist(), strict=True))
