"""Where a probe's rules stand, in a checkpoint and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from ..adapters.processes import from_first
from ..whole_file import whole_file
from .opening import checkpoint_folders
from .probing import Probing
from .rules import Standing

STATE_FILE = "safety_eval_state.json"


def save_standing(probing: Probing, folder: Path) -> None:
    """Write the state file into a checkpoint's folder, if there is one; a full disk is told once."""
    if not folder.is_dir():
        return
    try:
        with whole_file(folder / STATE_FILE) as part:
            text = json.dumps({"seconds": probing.seconds, **vars(probing.standing)})
            part.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        probing.warn("state", f"the probe's state of {folder.name} could not be saved ({error}): its rules start anew")


def load_standing(args: TrainingArguments, state: TrainerState) -> tuple[Standing, float]:
    """Return where the rules stood and the seconds spent, from the checkpoint of the present step; or as at the start.

    Collective: the first rank reads.
    """
    found = _read(args, state) if state.is_world_process_zero and state.global_step > 0 else None
    return from_first(found or (Standing(), 0.0))


def _read(args: TrainingArguments, state: TrainerState) -> tuple[Standing, float] | None:
    for folder in checkpoint_folders(args, state):
        try:
            values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            return Standing(**{k: v for k, v in values.items() if k != "seconds"}), float(values["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
