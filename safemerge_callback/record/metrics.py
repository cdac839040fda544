"""What a check and a gradient term are in numbers: the keys that every tracker receives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ..decision import BAND, Edit, Gate, MergePlan, Reading
from .progress import Progress


class Metric(NamedTuple):
    """Unit and meaning of a key, and what W&B keeps of it in a run's summary: min, max or last."""

    unit: str
    summary: str
    meaning: str


_CHECK = {
    "cosine_min": Metric("cosine", "min", "Lowest projected cosine of any module at this check."),
    "cosine_p10": Metric("cosine", "min", "Projected cosine that a tenth of the modules lie below."),
    "cosine_p50": Metric("cosine", "last", "Median projected cosine over the modules."),
    "cosine_mean": Metric("cosine", "last", "Mean projected cosine over the modules."),
    "cosine_max": Metric("cosine", "last", "Highest projected cosine of any module."),
    "null_cosine_mean": Metric(
        "cosine", "last", "Mean cosine that updates unrelated to the subspace would have in these modules."
    ),
    "z_min": Metric(
        "standard deviations", "min", "Lowest distance of any module's cosine from its null cosine, below it negative."
    ),
    "z_mean": Metric("standard deviations", "last", "Mean distance of the cosines from their null cosines."),
    "signed_z_min": Metric(
        "standard deviations",
        "min",
        "Lowest signed cosine of any module, in standard deviations of an unrelated update's.",
    ),
    "signed_z_mean": Metric(
        "standard deviations",
        "min",
        "Mean signed cosine over the modules, in standard deviations of an unrelated update's; below 0 the run takes "
        "back what aligned the model.",
    ),
    "moved_mean": Metric(
        "standard deviations · norm",
        "min",
        "Mean over the modules of how far the update goes along V: its signed cosine in those, times its norm. What "
        f"warns of lost refusals, below {BAND.edge:g} in the runs seen; absent where V is compressed.",
    ),
    "modules_opposed": Metric("modules", "max", "Number of modules whose signed cosine lies below -2 of those."),
    "safety_slope_mean": Metric(
        "nats a token",
        "max",
        "Mean over the modules of what their updates cost of the refusals, to first order; absent where nobody asks.",
    ),
    "gram_cosine_mean": Metric(
        "cosine",
        "last",
        "Mean over the modules of the cosine between the Grams of their inputs on the task and on harmful rows; "
        "absent where nobody asks.",
    ),
    "modules": Metric("modules", "last", "Number of modules measured."),
    "modules_below": Metric(
        "modules",
        "max",
        "Number of modules whose cosine is below the one that the gate merges them below; absent for a gate that has "
        "no such cosine.",
    ),
    "modules_merged": Metric("modules", "max", "Number of modules merged at this check."),
    "modules_merged_total": Metric("modules", "last", "Number of module merges since training began."),
    "task_weight_min": Metric(
        "share", "min", "Lowest share of the task's update that is left in any module after all its merges."
    ),
    "task_weight_mean": Metric("share", "last", "Mean share of the task's update that is left, over the modules."),
    "residual_max": Metric(
        "share", "max", "Largest relative part of a merged update that did not fit the live rank, at this check."
    ),
    "milliseconds": Metric("ms", "last", "Milliseconds that this check and its merge took."),
    "seconds_total": Metric("s", "last", "Seconds that the callback has taken since training began."),
}
# At the end of a run that reloaded its best model, on up to 50 evaluation batches.
_BEST = {
    "best_loss_before": Metric("loss", "last", "Evaluation loss of the reloaded best model before its final merge."),
    "best_loss_after": Metric("loss", "last", "Evaluation loss of the reloaded best model after its final merge."),
}

# Of each gradient term, whenever the trainer logs; figures of its own stand with the term.
TERM_METRICS = {
    "loss": Metric("loss", "last", "Mean loss since it was last logged, over the processes and before its weight."),
    "seconds": Metric("s", "last", "Seconds that its passes took since then, on the first process."),
    "norm": Metric(
        "norm", "last", "Norm of its weighted gradient in the last step with it, before clipping; absent if not known."
    ),
    "cosine": Metric("cosine", "last", "Cosine of that gradient and the task's own; absent if not known."),
}


def term_key(term: str, figure: str) -> str:
    """Return the key under which trackers have a figure of a gradient term."""
    return f"safemerge/corrections/{term}/{figure}"


CHECK_KEYS: dict[str, Metric] = {f"safemerge/{name}": metric for name, metric in _CHECK.items()}
BEST_KEYS: dict[str, Metric] = {f"safemerge/{name}": metric for name, metric in _BEST.items()}
KEYS: dict[str, Metric] = CHECK_KEYS | BEST_KEYS
METRICS: dict[str, str] = {key: metric.meaning for key, metric in CHECK_KEYS.items()}
BEST_METRICS: dict[str, str] = {key: metric.meaning for key, metric in BEST_KEYS.items()}


def check_metrics(plan: MergePlan, edits: Sequence[Edit], progress: Progress, seconds: float) -> dict[str, float]:
    """Return the numbers of one check under the keys of `METRICS`; one that is not finite is left out.

    `seconds` is the check's own duration; `progress` already counts its edits. Where the subspace file has no null_std
    there is no z.
    """
    readings = list(plan.readings.values())
    weights = [progress.task_weights.get(name, 1.0) for name in plan.readings]
    moved = plan.readings.moved_mean
    values = {
        **_spread([r.cosine for r in readings if math.isfinite(r.cosine)]),
        "null_cosine_mean": _mean([r.null_cosine for r in readings]),
        **_distances([z for z in map(z_of, readings) if z is not None]),
        # Where a part of the modules alone was read exactly, the others' signs are not known.
        **({} if moved is None else _signs([r.signed_z for r in readings if r.signed_z is not None], moved)),
        **{f"{name}_mean": _mean(_said(name, readings)) for name in ("safety_slope", "gram_cosine")},
        "modules": float(len(readings)),
        "modules_below": _below(plan) if plan.gate.limits else math.nan,
        "modules_merged": float(len(edits)),
        "modules_merged_total": float(progress.modules_merged),
        "task_weight_min": min(weights, default=1.0),
        "task_weight_mean": _mean(weights),
        "residual_max": max((e.residual for e in edits), default=0.0),
        "milliseconds": 1000 * seconds,
        "seconds_total": progress.seconds,
    }
    return {f"safemerge/{key}": value for key, value in values.items() if math.isfinite(value)}


def limit_of(plan: MergePlan, reading: Reading) -> float | None:
    """Return the cosine below which the plan's gate merges this module; None for a gate that has none."""
    limit = plan.gate.limit(reading)
    return limit if limit is not None and math.isfinite(limit) else None


def z_of(reading: Reading) -> float | None:
    """Return how many standard deviations the cosine lies from that of an unrelated update; None if not known."""
    if not reading.null_std or not reading.finite or not reading.comparable or reading.update_norm == 0:
        return None
    return (reading.cosine - reading.null_cosine) / reading.null_std


def _below(plan: MergePlan) -> float:
    limits = {name: limit_of(plan, reading) for name, reading in plan.readings.items()}
    return float(sum(limit is not None and plan.readings[name].cosine < limit for name, limit in limits.items()))


def _spread(cosines: Sequence[float]) -> dict[str, float]:
    if not cosines:
        return {}
    tenth = statistics.quantiles(cosines, n=10, method="inclusive")[0] if len(cosines) > 1 else cosines[0]
    return {
        "cosine_min": min(cosines),
        "cosine_p10": tenth,
        "cosine_p50": statistics.median(cosines),
        "cosine_mean": _mean(cosines),
        "cosine_max": max(cosines),
    }


def _distances(distances: Sequence[float]) -> dict[str, float]:
    return {"z_min": min(distances), "z_mean": _mean(distances)} if distances else {}


def _signs(distances: Sequence[float], moved: float) -> dict[str, float]:
    opposed = sum(z < Gate.z_threshold for z in distances)
    means = {"signed_z_mean": _mean(distances), "moved_mean": moved}
    return {"signed_z_min": min(distances), **means, "modules_opposed": float(opposed)}


def _said(signal: str, readings: Sequence[Reading]) -> list[float]:
    values = (reading.signals.get(signal, math.nan) for reading in readings)
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
