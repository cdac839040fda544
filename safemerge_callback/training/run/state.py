"""Where a run's counts and tensors stand, in a checkpoint and after a resume."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerState, TrainingArguments

from ...corrections.merge import Merge
from ...corrections.protocol import Kept
from ...errors import AdapterError
from ...live.initial import load_initial, save_initial
from ...live.ranks import from_first
from ...ops import LowRank
from ...record.progress import OLDER_FILE, Progress
from ..checkpoints import put_values, replace_values, resumed_folders, values_in, values_of
from .check_data import RunData

PART = "run"


class Saved(NamedTuple):
    """A checkpoint that the trainer wrote: the optimizer step, where, and the id of our tensors in it."""

    step: int
    folder: Path
    save: str


def kept_of(merge: Merge, corrections: Sequence[object], data: RunData) -> list[Kept]:
    """Return what checkpoints hold of a run: the merge's average, corrections that have state, and the task's rows."""
    rows = data if data.follows else None
    return [one for one in (merge.average, *corrections, rows) if isinstance(one, Kept)]


class Past(NamedTuple):
    """What a checkpoint holds of a run: its counts, the save that its tensors are of (None: any), where they may lie.

    Where there are no counts, `reason` says why in words that follow "the checkpoint of step 4".
    """

    progress: Progress | None
    save: str | None
    folders: list[Path]
    reason: str = "holds no state of SafeMergeCallback"

    def initial(self) -> dict[str, LowRank]:
        """Read what the factors began as; AdapterError where that cannot be found."""
        errors = []
        for folder in self.folders:
            try:
                return load_initial(folder, self.save)
            except AdapterError as error:
                errors.append(error)
        raise errors[-1]


def resumed(args: TrainingArguments, state: TrainerState) -> Past:
    """Return what the checkpoint that this run goes on from holds; nothing at step 0. Collective: the first rank reads.

    A state of another step is taken and told: what happened since is not in it.
    """
    if state.global_step == 0:
        return Past(None, None, [])
    past = _resumed(args, state) if state.is_world_process_zero else None
    return from_first(past) or Past(None, None, [])


def past_of(folder: Path) -> Past:
    """Return what the checkpoint in `folder` holds."""
    values = values_of(folder, PART)
    return _past(_older(folder) if values is None else values, [folder])


def save_run(
    state: TrainerState, saved: Saved, progress: Progress, initial: Mapping[str, LowRank], kept: Sequence[Kept]
) -> None:
    """Let the checkpoint that the trainer is writing hold the run: its counts, initial factors, and what is kept.

    Raises OSError.
    """
    put_values(state, PART, _values(saved, progress))
    if initial:
        save_initial(saved.folder, initial, saved.save)
    for one in kept:
        one.save(saved.folder, saved.save)


def save_run_again(saved: Saved, progress: Progress) -> None:
    """Replace the counts that a whole checkpoint holds; its tensors stay. Raises OSError and ValueError."""
    replace_values(saved.folder, PART, _values(saved, progress))


def _values(saved: Saved, progress: Progress) -> dict[str, Any]:
    counts = asdict(progress)
    if not progress.correction_steps:
        # A run without other corrections leaves what it always left.
        del counts["correction_steps"]
    return {"version": 1, "save": saved.save, "progress": counts}


def _resumed(args: TrainingArguments, state: TrainerState) -> Past:
    folders, values = resumed_folders(args, state), values_in(state, PART)
    if values is None:
        return _past(next((older for older in map(_older, folders) if older is not None), None), folders)
    past = _past(values, folders)
    if past.progress is not None and values.get("step") != state.global_step:
        warnings.warn(
            f"safemerge: the checkpoint's state is of step {values.get('step')}, since when it was trained without "
            "SafeMergeCallback: the counts go on from there",
            stacklevel=6,
        )
    return past


def _past(values: Any, folders: list[Path]) -> Past:
    if values is None:
        return Past(None, None, folders)
    try:
        if not isinstance(values, Mapping):
            raise ValueError("it is no mapping")
        save = values.get("save")
        return Past(Progress.of(values["progress"]), save if isinstance(save, str) else None, folders)
    except (ValueError, KeyError) as error:
        return Past(None, None, folders, f"holds a state of SafeMergeCallback that cannot be read ({error})")


def _older(folder: Path) -> Any:
    """The state in a file of its own, as it was once written; None where there is no such file."""
    try:
        return {"progress": json.loads((folder / OLDER_FILE).read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return str(error)
