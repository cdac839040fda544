"""A plan that merges nothing says so: which gate, and which module came closest to it."""

from __future__ import annotations

import math

from .gates import excluded
from .plan import MergePlan


def nothing_selected(plan: MergePlan) -> str:
    """Return what to tell a user whose plan selects no module: the gate, the closest module, and what to do."""
    module = closest(plan)
    if module is None:
        return f"nothing was merged: gate {plan.gate} had no module to decide on"
    return (
        f"nothing was merged: gate {plan.gate} selects none of {len(plan.readings)} modules. The closest is {module!r} "
        f"({plan.verdicts[module].reason}). Choose another gate or knob; gate 'all' merges every module"
    )


def closest(plan: MergePlan) -> str | None:
    """Return the module that lies least above what the gate merges below, in the gate's own unit; None without any.

    A module that no cosine decides comes last.
    """
    return min(plan.readings, key=lambda name: _distance(plan, name), default=None)


def _distance(plan: MergePlan, name: str) -> float:
    reading = plan.readings[name]
    return math.inf if excluded(reading) else plan.gate.distance(reading)
