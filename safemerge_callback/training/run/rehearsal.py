"""What cannot work shows before the first step: one check and one merge of everything, made and dropped."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ...corrections.merge import Merge
from ...corrections.protocol import RunPoint
from ...decision import Gate, MergePlan, Readings, merged_factors
from ...errors import AdapterError
from ...subspace import Subspace
from ..config.settings import SafeMergeConfig
from .check_data import RunData, ask
from .decide import choices_of
from .shares import RankShare, measure_together

# Share of a merged update's norm that truncation may lose before it is told.
WORTH_TELLING = 0.5


class Measuring(NamedTuple):
    """What a run measures with: all of it None where it has no subspace, and so no checks."""

    subspace: Subspace | None = None
    reference: Mapping[str, float] | None = None
    placement: Mapping[str, Any] | None = None
    share: RankShare | None = None


def rehearse(
    config: SafeMergeConfig,
    at: RunPoint,
    merge: Merge,
    measuring: Measuring,
    run: RunData,
) -> None:
    """Measure, ask, decide and compute a merge of everything, and drop it: what cannot work shows before step 1."""
    if measuring.subspace is None:
        return
    factors, gate = at.factors(), {"gate": config.gate_at(), "reference": measuring.reference}
    readings = measure_together(factors, measuring.subspace, measuring.share, gate)
    _require_finite(readings)
    answer = ask(run, at, rehearsal=True)
    readings, at = readings.with_signals(answer.signals), replace(at, data=answer.data)
    choices = choices_of(config)
    MergePlan.of(readings, choices)
    if config.merges:
        everything = MergePlan.of(readings, replace(choices, gate=Gate("all", seed=config.seed)))
        _, edits = merged_factors(everything, factors, merge.sources(at), at.subspace, grams=at.grams)
        _tell_losses([edit.residual for edit in edits if factors[edit.name].initial is not None])


def _require_finite(readings: Readings) -> None:
    """Raise AdapterError for an adapter that is broken before it is trained."""
    broken = [name for name, reading in readings.items() if not reading.finite]
    if broken:
        raise AdapterError(
            f"{len(broken)} of {len(readings)} LoRA modules hold NaN or infinite numbers before the first step, first "
            f"{broken[0]!r}: begin with a new adapter, or with a checkpoint from before its training diverged"
        )


def _tell_losses(residuals: Sequence[float]) -> None:
    """Warn where factors that hold a part of the base weight have no rank left for the safety adapter's update."""
    lost = statistics.median(residuals) if residuals else 0.0
    if lost > WORTH_TELLING:
        warnings.warn(
            f"safemerge: the adapter's factors began as a part of the base weight (PiSSA, OLoRA) and keep their rank, "
            f"so a merge made now would lose {lost:.0%} of the merged update's norm (median of {len(residuals)} "
            "modules). What is measured is exact; to merge, train a plain LoRA",
            stacklevel=4,
        )
