"""`task_slope`: what a module's update costs of the task, to first order: below 0 where more of it would help."""

from __future__ import annotations

from ..check_data import TASK_BATCH, CheckData
from ..slopes import SLOPE_ENGINES, module_slopes
from .registry import module_signal


@module_signal(needs={TASK_BATCH}, engines=SLOPE_ENGINES, cost="one forward and backward pass over the task rows")
def task_slope(data: CheckData) -> dict[str, float]:
    """Return each module's slope of the loss on the rows that were trained on last."""
    return module_slopes(data, data.task_batch)
