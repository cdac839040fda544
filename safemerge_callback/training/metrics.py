"""What a check is in numbers: the keys that every tracker receives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..decision import Edit, MergePlan
from .progress import Progress

METRICS: dict[str, str] = {
    "safemerge/cosine_min": "Lowest projected cosine of any module at this check.",
    "safemerge/cosine_mean": "Mean projected cosine over the modules.",
    "safemerge/cosine_median": "Median projected cosine over the modules.",
    "safemerge/cosine_max": "Highest projected cosine of any module.",
    "safemerge/null_cosine_mean": "Mean cosine that updates unrelated to the subspace would have in these modules.",
    "safemerge/modules": "Number of modules measured.",
    "safemerge/modules_below": "Number of modules whose cosine is below the threshold.",
    "safemerge/modules_merged": "Number of modules merged at this check.",
    "safemerge/modules_merged_total": "Number of module merges since training began.",
    "safemerge/task_weight_min": "Lowest share of the task's update that is left in any module after all its merges.",
    "safemerge/residual_max": "Largest relative part of a merged update that did not fit the live rank, at this check.",
    "safemerge/seconds": "Seconds that this check and its merge took.",
    "safemerge/seconds_total": "Seconds that the callback has taken since training began.",
}


# At the end of a run that reloaded its best model, on up to 50 evaluation batches.
BEST_METRICS: dict[str, str] = {
    "safemerge/best_loss_before": "Evaluation loss of the reloaded best model before its final merge.",
    "safemerge/best_loss_after": "Evaluation loss of the reloaded best model after its final merge.",
}


def check_metrics(plan: MergePlan, edits: Sequence[Edit], progress: Progress, seconds: float) -> dict[str, float]:
    """Return the numbers of one check under the keys of `METRICS`; one that is not finite is left out.

    `seconds` is the check's own duration; `progress` already counts its edits.
    """
    readings = list(plan.readings.values())
    cosines = [r.cosine for r in readings if math.isfinite(r.cosine)]
    values = {
        **_spread(cosines),
        "null_cosine_mean": _mean([r.null_cosine for r in readings]),
        "modules": float(len(readings)),
        "modules_below": float(sum(c < plan.threshold for c in cosines)),
        "modules_merged": float(len(edits)),
        "modules_merged_total": float(progress.modules_merged),
        "task_weight_min": min(progress.task_weights.values(), default=1.0),
        "residual_max": max((e.residual for e in edits), default=0.0),
        "seconds": seconds,
        "seconds_total": progress.seconds,
    }
    return {f"safemerge/{key}": value for key, value in values.items() if math.isfinite(value)}


def _spread(cosines: Sequence[float]) -> dict[str, float]:
    if not cosines:
        return {}
    return {
        "cosine_min": min(cosines),
        "cosine_mean": _mean(cosines),
        "cosine_median": statistics.median(cosines),
        "cosine_max": max(cosines),
    }


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
