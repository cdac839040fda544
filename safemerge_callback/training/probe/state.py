"""Where a probe's rules stand, in a checkpoint and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from ...live.faults import Fault, attempt
from ...live.ranks import from_first
from ..checkpoints import put_values, resumed_folders, values_in
from .probing import Probing
from .rules import Standing

PART = "probe"
# Where the state was before it was a part of the trainer's own file.
OLDER_FILE = "safety_eval_state.json"


def save_standing(probing: Probing, folder: Path) -> None:
    """Let the checkpoint that the trainer is writing into `folder` hold where the rules stand; a fault is told once."""
    values = {"seconds": probing.spent.seconds, **vars(probing.standing)}
    done = attempt("state", lambda: put_values(probing.state, PART, values))
    if isinstance(done, Fault):
        words = f"the probe's state of {folder.name} could not be saved ({done.error}): its rules start anew"
        probing.log.warn("state", words)


def load_standing(probing: Probing, args: TrainingArguments, state: TrainerState) -> None:
    """Go on where the rules stood and with the seconds spent, as the checkpoint of the present step has them.

    Warns where it has none and a rule would go on from it. Collective: the first rank reads.
    """
    if state.global_step == 0:
        return
    found = from_first(_read(args, state) if state.is_world_process_zero else None)
    if found is not None:
        probing.standing, probing.spent.seconds = found
    elif probing.rules.trigger or probing.rules.stop:
        words = f"the checkpoint of step {state.global_step} holds no state of SafetyEvalCallback: its rules begin anew"
        probing.log.warn("state", words)


def _read(args: TrainingArguments, state: TrainerState) -> tuple[Standing, float] | None:
    ours = values_in(state, PART)
    if ours is not None:
        return _standing(ours)
    return next((found for found in map(_older, resumed_folders(args, state)) if found is not None), None)


def _standing(values: Any) -> tuple[Standing, float] | None:
    try:
        return Standing(**{k: v for k, v in values.items() if k not in ("seconds", "step")}), float(values["seconds"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _older(folder: Path) -> tuple[Standing, float] | None:
    try:
        return _standing(json.loads((folder / OLDER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
