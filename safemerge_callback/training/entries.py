"""What a run writes of itself, to the journal and to the trackers' table."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from ..adapters.names import layer_and_type
from ..decision import MergePlan
from ..io.addresses import source_name
from ..record.metrics import limit_of, z_of
from ..record.progress import Progress
from ..subspace import Subspace
from ..subspace.placement import Choice
from .config.settings import SafeMergeConfig
from .run.forecast import Forecast
from .trackers import Row, finite


def broken_modules(step: int, plan: MergePlan) -> str | None:
    """Return what to warn of where updates are not finite; None where all are."""
    broken = [name for name, reading in plan.readings.items() if not reading.finite]
    if not broken:
        return None
    return (
        f"{len(broken)} modules hold NaN or infinite updates at step {step} and are not merged, first "
        f"{broken[0]!r}: lower the learning rate or resume from an earlier checkpoint"
    )


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


def start_entry(
    step: int,
    config: SafeMergeConfig,
    subspace: Subspace,
    num_modules: int,
    world_size: int,
    choice: Choice,
    plan: Forecast,
) -> dict[str, Any]:
    """Return the entry that opens a journal, or marks where a resumed run goes on."""
    names = ("torch", "transformers", "peft", "safemerge-callback")
    return {
        "kind": "start",
        "version": 1,
        "step": step,
        "config": config.to_publish(),
        "versions": {name: _version(name) for name in names},
        "subspace": {
            "path": source_name(config.subspace),
            "aligned": subspace.aligned,
            "unaligned": subspace.unaligned,
        },
        "placement": choice.to_dict(),
        "num_modules": num_modules,
        "world_size": world_size,
        "planned": plan.to_dict(),
    }


def end_entry(step: int, progress: Progress, seconds: float) -> dict[str, Any]:
    """Return the entry that closes a journal."""
    return {
        "kind": "end",
        "step": step,
        "checks": progress.checks,
        "merges": progress.merges,
        "modules_merged": progress.modules_merged,
        "seconds": seconds,
        "training_seconds": progress.training_seconds,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
