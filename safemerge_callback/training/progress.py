"""What must be remembered between steps, in a checkpoint and after a resume; and the journal that goes with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..decision import read_journal
from ..whole_file import whole_file

STATE_FILE = "safemerge_state.json"
# Fields that an older state file may lack.
_LATER = ("config", "pending", "disarmed")


@dataclass
class Progress:
    """Counts since training began, over all resumes. Steps are optimizer steps, seconds are wall clock.

    `task_weights` holds, for every module ever merged, the product of the task's weights: the share of its update left.
    `final_step` is the step of the last final check, `pending` the step of a check that was measured but not yet
    decided, `journal_entries` how many lines the journal had, `config` the settings that held. `disarmed` are the
    modules that were merged and not seen above the gate since, where the settings ask for that.
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

    def record_merge(self, step: int, shares: Mapping[str, float]) -> None:
        """Count a merge at `step`; `shares`: module -> the share of its own update that it keeps."""
        self.merges += 1
        self.modules_merged += len(shares)
        self.merged_steps.append(step)
        self.last_merge = step
        for name, share in shares.items():
            self.task_weights[name] = self.task_weights.get(name, 1.0) * share
        self.disarmed = sorted({*self.disarmed, *shares})

    def rewind(self, checkpoint: Progress | None) -> None:
        """Take over what belongs to the weights (not the counts) from the checkpoint that they were loaded from."""
        self.task_weights = dict(checkpoint.task_weights) if checkpoint else {}
        self.last_merge = checkpoint.last_merge if checkpoint else None
        self.disarmed = list(checkpoint.disarmed) if checkpoint else []

    def save(self, folder: Path) -> None:
        """Write the state file into `folder`, whole or not at all; OSError if that fails."""
        with whole_file(folder / STATE_FILE) as part:
            part.write_text(json.dumps({"version": 1, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Progress | None:
        """Read the state file of a checkpoint folder; None where it has none, or one that cannot be read."""
        try:
            values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name not in _LATER or f.name in values})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def find_progress(step: int, folders: Iterable[Path]) -> Progress | None:
    """Return the progress of the checkpoint of `step`, from the first folder that holds one; None at step 0."""
    found = (Progress.load(folder) for folder in folders if step > 0)
    return next((progress for progress in found if progress is not None), None)


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the settings that differ, as `threshold 0.35 -> 0.4`; one that `old` does not know has not changed."""
    moved = [f"{name} {old[name]!r} -> {value!r}" for name, value in new.items() if name in old and old[name] != value]
    return ", ".join(moved)


def cut(entries: Sequence[Mapping[str, Any]], step: int, count: int | None) -> list[Mapping[str, Any]]:
    """Return the journal entries that a run resumed at `step` already has.

    `count` is how many there were when the checkpoint was saved; without it, all up to `step` are kept. A run that goes
    on has not ended, and lines after the checkpoint tell of weights that are gone.
    """
    return [e for e in entries[:count] if e.get("step", math.inf) <= step and e.get("kind") != "end"]


def continue_journal(path: Path, step: int, count: int | None) -> int:
    """Ready the journal at `path` for a run from `step` on; return how many entries it has.

    At step 0 an older journal is set aside under the next free number; later it is cut back to the checkpoint.
    Raises JournalError for a file that is no journal, and OSError.
    """
    if not path.exists():
        return 0
    entries = read_journal(path)
    if step == 0:
        if entries:
            path.rename(_free_name(path))
        return 0
    kept = cut(entries, step, count)
    with whole_file(path) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    return len(kept)


def _free_name(path: Path) -> Path:
    numbers = range(1, len(list(path.parent.iterdir())) + 2)
    return next(p for n in numbers if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())
