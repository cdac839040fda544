"""What must be remembered between steps, in a checkpoint and after a resume; and the journal that goes with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from ..io.numbers import is_number
from ..io.whole_file import whole_file
from .journal import read_journal

# Where the state was before it was a part of the trainer's own file.
OLDER_FILE = "safemerge_state.json"
# Fields that an older state may lack.
_LATER = ("config", "pending", "disarmed", "correction_steps")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("last_merge", "final_step", "pending"), (int, NoneType)),
    **dict.fromkeys(("seconds", "training_seconds"), (int, float)),
}


@dataclass
class Progress:
    """Counts since training began, over all resumes. Steps are optimizer steps, seconds are wall clock.

    `task_weights` holds, for every module ever merged, the product of the task's weights: the share of its update left.
    `final_step` is the step of the last final check, `pending` the step of a check that was measured but not yet
    decided, `journal_entries` how many lines the journal had, `config` the settings that held. `disarmed` are the
    modules that were merged and not seen above the gate since, where the settings ask for that. `correction_steps`:
    correction other than the merge -> the steps that had its change or its gradient.
    """

    checks: int = 0
    merges: int = 0
    modules_merged: int = 0
    merged_steps: list[int] = field(default_factory=list)
    last_merge: int | None = None
    final_step: int | None = None
    task_weights: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    training_seconds: float = 0.0
    journal_entries: int = 0
    pending: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    disarmed: list[str] = field(default_factory=list)
    correction_steps: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the training time, from 0 to 1, that the hooks took."""
        return min(self.seconds / max(self.training_seconds, 1e-9), 1.0)

    def record_merge(self, step: int, shares: Mapping[str, float]) -> None:
        """Count a merge at `step`; `shares`: module -> the share of its own update that it keeps."""
        self.merges += 1
        self.modules_merged += len(shares)
        self.merged_steps.append(step)
        self.last_merge = step
        self.record_change(shares)
        self.disarmed = sorted({*self.disarmed, *shares})

    def record_change(self, shares: Mapping[str, float]) -> None:
        """Take over what a change that is no merge leaves; `shares` as `record_merge`."""
        for name, share in shares.items():
            self.task_weights[name] = self.task_weights.get(name, 1.0) * share

    def record_correction(self, name: str, steps: int = 1) -> None:
        """Count steps more at which a correction did something."""
        self.correction_steps[name] = self.correction_steps.get(name, 0) + steps

    def rewind(self, checkpoint: Progress | None) -> None:
        """Take over what belongs to the weights (not the counts) from the checkpoint that they were loaded from."""
        self.task_weights = dict(checkpoint.task_weights) if checkpoint else {}
        self.last_merge = checkpoint.last_merge if checkpoint else None
        self.disarmed = list(checkpoint.disarmed) if checkpoint else []

    @classmethod
    def of(cls, values: Any) -> Progress:
        """Make one of what `asdict` gave. Raises ValueError for anything else."""
        try:
            known = {f.name: values[f.name] for f in fields(cls) if f.name not in _LATER or f.name in values}
        except (KeyError, TypeError) as error:
            raise ValueError(f"it lacks {error}" if isinstance(error, KeyError) else "it is no mapping") from error
        blank = cls()
        for name, value in known.items():
            kinds = _KINDS.get(name, type(getattr(blank, name)))
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}")
        if not all(isinstance(share, int | float) for share in known["task_weights"].values()):
            raise ValueError(f"task_weights is {known['task_weights']!r}")
        if not all(isinstance(step, int) for step in known["merged_steps"]):
            raise ValueError(f"merged_steps is {known['merged_steps']!r}")
        if not all(isinstance(steps, int) for steps in known.get("correction_steps", {}).values()):
            raise ValueError(f"correction_steps is {known['correction_steps']!r}")
        return cls(**known)


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the settings that differ, as `threshold 0.35 -> 0.4`; one that `old` does not know has not changed."""
    moved = [f"{name} {old[name]!r} -> {value!r}" for name, value in new.items() if name in old and old[name] != value]
    return ", ".join(moved)


def cut(entries: Sequence[Mapping[str, Any]], step: int, count: int | None) -> list[Mapping[str, Any]]:
    """Return the journal entries that a run resumed at `step` already has.

    `count` is how many there were when the checkpoint was saved; without it, all up to `step` are kept. A run that goes
    on has not ended, and lines after the checkpoint tell of weights that are gone.
    """
    return [e for e in entries[:count] if is_number(e.get("step")) and e["step"] <= step and e.get("kind") != "end"]


def rebuilt(entries: Sequence[Mapping[str, Any]]) -> Progress | None:
    """Return the counts that a journal tells of, for a checkpoint that lacks its own; None where it tells of none.

    What a journal does not tell is missing: seconds, and which modules were seen above the gate since their merge.
    """
    progress, before = Progress(), Progress()
    try:
        for entry in entries:
            if entry["kind"] == "check":
                progress.checks += 1
            elif entry["kind"] == "merge":
                before = deepcopy(progress)
                left = {module["name"]: float(module["task_weight"]) for module in entry["modules"]}
                progress.record_merge(int(entry["step"]), dict.fromkeys(left, 1.0))
                progress.task_weights |= left
            elif entry["kind"] == "change":
                before = deepcopy(progress)
                progress.task_weights |= {m["name"]: float(m["task_weight"]) for m in entry["modules"]}
                progress.record_correction(str(entry["correction"]))
            elif entry["kind"] == "gradient":
                progress.record_correction(str(entry["correction"]), int(entry["steps"]))
            elif entry["kind"] == "rollback":
                progress = replace(before, checks=progress.checks)
    except (KeyError, TypeError, ValueError):
        return None
    return progress if progress.checks or progress.correction_steps else None


def continue_journal(path: Path, step: int, count: int | None) -> list[Mapping[str, Any]]:
    """Ready the journal at `path` for a run from `step` on; return the entries it has.

    At step 0 an older journal is set aside under the next free number; later it is cut back to the checkpoint.
    Raises JournalError for a file that is no journal, and OSError.
    """
    if not path.exists():
        return []
    entries = read_journal(path)
    if step == 0:
        if entries:
            path.rename(_free_name(path))
        return []
    kept = cut(entries, step, count)
    with whole_file(path) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    return kept


def _free_name(path: Path) -> Path:
    numbers = range(1, len(list(path.parent.iterdir())) + 2)
    return next(p for n in numbers if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())
