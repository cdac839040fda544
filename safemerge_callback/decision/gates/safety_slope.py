"""`safety_slope`: the modules whose update costs the most of what the aligned model refuses, by its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...io.choices import truth
from ...io.knobs import Knob
from ..reading import Readings
from .common import Verdict, not_finite, share_above_zero, signal_of
from .quantile import share_of
from .registry import gate, never

# The least slope of the task that a module is divided by, of the largest of all modules: beneath it is noise.
LEAST_SHARE = 0.01


def _per_task(value: Any, _beside: Mapping[str, Any]) -> bool:
    return bool(truth(value, "per_task_slope"))


SLOPE_SHARE = Knob(
    "slope_share",
    "Share of the modules, those of highest safety slope, that gate safety_slope merges.",
    share_above_zero("slope_share"),
    0.5,
)
PER_TASK_SLOPE = Knob(
    "per_task_slope",
    "Whether gate safety_slope ranks the slope per unit of the task's own.",
    _per_task,
    False,
    needs={True: frozenset({"task_slope"})},
)


@gate(knob=SLOPE_SHARE, more=(PER_TASK_SLOPE,), needs=frozenset({"safety_slope"}), ranked=True, asks=never)
def safety_slope(readings: Readings, *, slope_share: float, per_task_slope: bool) -> dict[str, Verdict]:
    """Merge the share of the moved modules with the highest safety slopes; never one whose slope is not above 0.

    The slope is ⟨ΔW, ∂L/∂ΔW⟩ for the loss L of refusals: to first order, what the module's update costs of them. With
    `per_task_slope` modules are ranked by it per unit of what the update gains for the task, whose slope counts as at
    least a hundredth of the largest. Modules without a slope are left alone.

    Source: none; the sensitivity ⟨θ, ∂L/∂θ⟩ of pruning (SNIP, arXiv:1810.02340), signed, on an update. ConfigError for
    readings without slopes: they are taken in training, and offline where rows are given.
    """
    slopes = {name: signal_of(reading, "safety_slope", "safety_slope", "slopes") for name, reading in readings.items()}
    rates = slopes
    if per_task_slope:
        rates = _per_unit(
            slopes,
            {name: signal_of(reading, "safety_slope", "task_slope", "slopes") for name, reading in readings.items()},
        )
    moved = [name for name, reading in readings.items() if reading.update_norm != 0 and math.isfinite(slopes[name])]
    order = sorted((name for name in moved if slopes[name] > 0), key=lambda name: (-rates[name], name))
    count = share_of(slope_share, len(moved))
    rank = {name: place for place, name in enumerate(order, 1)}

    def verdict(name: str) -> Verdict:
        if name not in moved:
            return Verdict(False, "has not moved, so it has no slope")
        sentence = f"safety slope {slopes[name]:+.3g}" + (
            f", {rates[name]:.3g} per task slope" if per_task_slope else ""
        )
        if name not in rank:
            return Verdict(False, f"{sentence}: its update costs no refusals")
        chosen = rank[name] <= count
        words = f"{'among' if chosen else 'not among'} the highest {slope_share:g} ({count})"
        return Verdict(chosen, f"{sentence}, number {rank[name]} of {len(order)}, {words}")

    return {name: not_finite(reading) or verdict(name) for name, reading in readings.items()}


def _per_unit(slopes: Mapping[str, float], task: Mapping[str, float]) -> dict[str, float]:
    """The safety slope per unit of what the update gains for the task, -⟨ΔW, ∂L_task/∂ΔW⟩, floored."""
    gains = {name: -slope for name, slope in task.items() if math.isfinite(slope)}
    least = LEAST_SHARE * max((abs(gain) for gain in gains.values()), default=0.0)
    return {name: slope / max(gains.get(name, 0.0), least) if least > 0 else slope for name, slope in slopes.items()}
