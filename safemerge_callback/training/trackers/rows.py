"""One check as the trackers' table has it: a row a module."""

from __future__ import annotations

from collections.abc import Mapping

from ...adapters.names import layer_and_type
from ...decision import MergePlan
from ...record.metrics import limit_of, z_of
from .columns import Row
from .protocol import finite


def decision_rows(step: int, plan: MergePlan, task_weights: Mapping[str, float]) -> list[Row]:
    """Return a row of the trackers' table for each module; `task_weights` after this check's merges."""
    return [
        Row(
            step,
            *layer_and_type(name),
            name,
            finite(reading.cosine),
            finite(reading.null_cosine),
            finite(z_of(reading)),
            limit_of(plan, reading),
            finite(reading.update_norm),
            task_weights.get(name, 1.0),
            *plan.verdicts[name],
            finite(reading.moved),
        )
        for name, reading in plan.readings.items()
    ]
