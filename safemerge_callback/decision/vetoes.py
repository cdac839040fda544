"""Reasons to hold back a merge that the gate asked for: it would be one too many."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from .gates import Verdict, excluded
from .plan import MergePlan

# Shares are products of rounded weights.
_ROUNDING = 1e-9


def held_back(verdicts: Mapping[str, Verdict], reasons: Mapping[str, str]) -> dict[str, Verdict]:
    """Return the verdicts with the merges of these modules held back, the reason saying so."""
    return {
        name: Verdict(False, f"{v.reason}; {reasons[name]}") if v.merge and name in reasons else v
        for name, v in verdicts.items()
    }


def without(plan: MergePlan, reasons: Mapping[str, str]) -> MergePlan:
    """Return the plan with the merges of these modules held back."""
    return replace(plan, verdicts=held_back(plan.verdicts, reasons)) if reasons else plan


def under_floor(plan: MergePlan, task_weights: Mapping[str, float], floor: float) -> dict[str, str]:
    """Return module -> reason for every merge of the plan that would push the compounded task weight under `floor`.

    task_weights: module -> product of the task's weights in all merges so far, 1.0 where there was none.
    """
    left = {name: task_weights.get(name, 1.0) * plan.task_weight_of(name) for name in plan.selected}
    return {
        name: f"held back: {share:.4f} of the task's update would be left, under min_task_weight {floor:g}"
        for name, share in left.items()
        if under(share, floor)
    }


def share_left(task_weight: float, merges: int, floor: float = 0.0, before: float = 1.0) -> float:
    """Return the share of an update that is left after `merges` merges that each leave `task_weight` of it.

    `before`: the share that earlier ones have left. A merge that would leave less than `floor` is held back, as in
    `under_floor`. Exact for a sum of updates but for what its rank loses.
    """
    left = before
    for _ in range(merges):
        if under(left * task_weight, floor):
            break
        left *= task_weight
    return left


def under(share: float, floor: float) -> bool:
    """Whether `share`, a product of rounded weights, lies under `floor`; 0.8 three times over is not under 0.512."""
    return share < floor - _ROUNDING


def above(plan: MergePlan) -> frozenset[str]:
    """Return the modules seen above the gate by the gate's `rearm`, which may be merged again; all where it is None.

    For a gate that merges below a cosine of the module's own, those at or above that cosine with the knob raised by
    `rearm`; for one that ranks, those that it did not choose. Never a module that no cosine decides. Ask it of the
    gate's own verdicts, before any is held back.
    """
    margin = plan.gate.rearm
    if margin is None:
        return frozenset(plan.readings)
    if plan.gate.ranked:
        return frozenset(n for n, r in plan.readings.items() if not (plan.verdicts[n].merge or excluded(r)))
    limits = {name: plan.gate.limit(reading, margin) for name, reading in plan.readings.items()}
    return frozenset(n for n, r in plan.readings.items() if r.cosine >= _or_never(limits[n]))


def not_rearmed(plan: MergePlan, disarmed: Collection[str]) -> dict[str, str]:
    """Return module -> reason for every merge of the plan of a `disarmed` module: merged, and not seen above since.

    empty where the plan's gate has no `rearm`.
    """
    if plan.gate.rearm is None:
        return {}
    margin = f" by {plan.gate.rearm:g}" if plan.gate.rearm else ""
    reason = f"not re-armed: not seen above the gate{margin} since its last merge"
    return {name: reason for name in plan.selected if name in disarmed}


def _or_never(limit: float | None) -> float:
    return math.inf if limit is None else limit
