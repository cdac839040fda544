"""What a run says of itself: `start`, `error`, `best`, `end`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..history import Best, History
from ..journal import VERSION
from ..progress import Progress
from .values import count, known, number


class Sources(NamedTuple):
    """What V was made of: the subspace file as it is called, and what its header says of the two checkpoints."""

    path: str | None
    aligned: Any
    unaligned: Any


def start_entry(
    step: int,
    config: Mapping[str, Any],
    versions: Mapping[str, str | None],
    subspace: Sources,
    num_modules: int,
    *,
    placement: Mapping[str, Any] | None = None,
    world_size: int | None = None,
    planned: Mapping[str, Any] | None = None,
    restored: bool | None = None,
    left_out: Mapping[str, str] | None = None,
    prepared: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the entry that opens a journal, or marks where a resumed run goes on.

    `config` are the settings, `subspace` what V was made of. Of a training besides: where V is kept, the number of
    processes, what is planned, whether a checkpoint's state was found, what merges leave out of each safety adapter,
    and the seconds that each correction took to ready itself.
    """
    provenance = {"config": dict(config), "versions": dict(versions), "subspace": subspace._asdict()}
    sizes = {"placement": placement, "num_modules": num_modules, "world_size": world_size}
    of_a_training = {"planned": planned, "restored": restored, "left_out": left_out, "prepared": prepared}
    more = {key: value for key, value in (sizes | of_a_training).items() if value is not None}
    return {"kind": "start", "version": VERSION, "step": step, **provenance, **more}


def read_start(history: History, entry: Mapping[str, Any]) -> None:
    """Another start: whatever ended before it has not, and what readied itself does so again."""
    for name, seconds in dict(entry.get("prepared", {})).items():
        history.prepared[str(name)] = history.prepared.get(str(name), 0.0) + number(seconds)
    history.starts.append({**entry, "step": count(entry.get("step", 0))})
    history.end = {}


def versions_of(*names: str) -> dict[str, str | None]:
    """Return the installed version of each distribution; None for one that is not."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def error_entry(step: int, where: str, error: str) -> dict[str, Any]:
    """Return the entry of what went wrong `where` (measure, merge, probe, tracker wandb, ...) and cost no training."""
    return {"kind": "error", "step": step, "where": where, "error": error}


def read_error(history: History, entry: Mapping[str, Any]) -> None:
    """One fault more, in a line."""
    history.faults.append(f"step {entry['step']}, {entry['where']}: {entry['error']}")


def best_entry(
    step: int, checkpoint: str, metric: float | None, loss_before: float | None, loss_after: float | None
) -> dict[str, Any]:
    """Return the entry of a best model that was reloaded at the end and merged: its evaluation loss before and after.

    `checkpoint` is the folder's name, `metric` what the trainer chose it by.
    """
    losses = {"best_loss_before": loss_before, "best_loss_after": loss_after}
    return {"kind": "best", "step": step, "checkpoint": checkpoint, "best_metric": metric, **losses}


def read_best(history: History, entry: Mapping[str, Any]) -> None:
    """The best model of the last training of the journal."""
    numbers = (known(entry.get(key)) for key in ("best_metric", "best_loss_before", "best_loss_after"))
    history.best = Best(count(entry["step"]), str(entry["checkpoint"]), *numbers)


def end_entry(step: int, progress: Progress, seconds: float, training_seconds: float | None = None) -> dict[str, Any]:
    """Return the entry that closes a journal: counts over all resumes; the seconds spent, and those of the training."""
    counts = {name: getattr(progress, name) for name in ("checks", "merges", "modules_merged")}
    trained = {} if training_seconds is None else {"training_seconds": training_seconds}
    return {"kind": "end", "step": step, **counts, "seconds": seconds, **trained}


def read_end(history: History, entry: Mapping[str, Any]) -> None:
    """The run is over, unless a start follows."""
    seconds = {key: known(entry.get(key)) for key in ("seconds", "training_seconds")}
    history.end = {**entry, **seconds, **({"step": count(entry["step"])} if "step" in entry else {})}
