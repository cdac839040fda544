"""`safety_slope`: what a module's update costs of the aligned model's refusals, to first order."""

from __future__ import annotations

from ..check_data import SAFETY_BATCH, CheckData
from ..slopes import SLOPE_ENGINES, module_slopes
from .registry import module_signal


@module_signal(needs={SAFETY_BATCH}, engines=SLOPE_ENGINES, cost="one forward and backward pass over the harmful rows")
def safety_slope(data: CheckData) -> dict[str, float]:
    """Return each module's slope of the refusals' loss: above 0 where its update costs safety."""
    return module_slopes(data, data.harmful)
