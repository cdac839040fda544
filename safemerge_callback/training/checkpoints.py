"""What a checkpoint holds of ours, and where it lies: values in the trainer's `trainer_state.json`, tensors beside it.

The trainer writes that file last, and it is what makes a checkpoint count. Our values are in it, and our tensors are
written before it, so a kill leaves all of a checkpoint or none. The values name the tensors that belong to them by an
id, so that a file which lies in a folder of the right name and is another save's is never taken for them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io.whole_file import whole_file

# No class's name: the trainer makes callbacks anew from what is stored under the names of their classes.
KEY = "safemerge"
TRAINER_STATE = "trainer_state.json"


def at_each_save(state: TrainerState, act: Callable[[Path], None]) -> None:
    """Let `act` have the folder of every checkpoint right before the trainer's last file is written there.

    No hook comes at that moment, and none names the folder, but this one call of the trainer does. Lasts until
    `no_more_saves`. `act` must not raise: it would cost the user the checkpoint.
    """
    state.save_to_json = _Write(state, act)


class _Write:
    """In the place of a state's `save_to_json`: `act` first. A copy of the state, pickled or deep, has its own method.

    The state that a user's callback saves elsewhere, as `trainer.save_state()` does, is no checkpoint, and stays as it
    is.
    """

    def __init__(self, state: TrainerState, act: Callable[[Path], None]) -> None:
        self._state, self._act, self._write = state, act, state.save_to_json

    def __call__(self, json_path: str) -> None:
        folder = Path(json_path).parent
        if folder.name == f"{PREFIX_CHECKPOINT_DIR}-{self._state.global_step}":
            self._act(folder)
        self._write(json_path)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._state, "save_to_json")


def no_more_saves(state: TrainerState) -> None:
    """Give the trainer's state its own method back."""
    vars(state).pop("save_to_json", None)


def put_values(state: TrainerState, part: str, values: Mapping[str, Any]) -> None:
    """Let the trainer's next checkpoints hold `values`, with the present step. Raises TypeError for what JSON lacks."""
    plain = json.loads(json.dumps({"step": state.global_step, **values}))
    state.stateful_callbacks = _with(state.stateful_callbacks, part, plain)


def values_in(state: TrainerState, part: str) -> Any:
    """Return what the checkpoint that `state` was read from holds as `part`; None where there is nothing."""
    return _part(state.stateful_callbacks, part)


def values_of(folder: Path, part: str) -> Any:
    """Return what the checkpoint in `folder` holds as `part`; None where there is nothing, or nothing readable."""
    try:
        return _part(json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))["stateful_callbacks"], part)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def replace_values(folder: Path, part: str, values: Mapping[str, Any]) -> None:
    """Replace what the checkpoint in `folder` holds as `part`, and nothing else. Raises OSError and ValueError."""
    whole = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    step = {"step": whole["global_step"]}
    whole["stateful_callbacks"] = _with(whole.get("stateful_callbacks"), part, {**step, **values})
    with whole_file(folder / TRAINER_STATE) as place:
        place.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def resumed_folders(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """Where the checkpoint that this run goes on from may lie; one folder where the trainer tells; none at step 0."""
    if state.global_step == 0:
        return []
    read = _folder_read()
    if read is not None:
        return [read]
    name = f"checkpoint-{state.global_step}"
    source = args.resume_from_checkpoint
    named = [Path(source)] if isinstance(source, str) and Path(source).name == name else []
    return [*named, Path(args.output_dir) / name]


def _folder_read() -> Path | None:
    """The folder that the trainer which calls this has read; it keeps the name in a variable of its own alone."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name in ("_inner_training_loop", "train") and "resume_from_checkpoint" in frame.f_locals:
            folder = frame.f_locals["resume_from_checkpoint"]
            return Path(folder) if isinstance(folder, str | Path) else None
    return None


def _part(stored: Any, part: str) -> Any:
    ours = stored.get(KEY) if isinstance(stored, Mapping) else None
    return ours.get(part) if isinstance(ours, Mapping) else None


def _with(stored: Any, part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    stored = dict(stored) if isinstance(stored, Mapping) else {}
    ours = stored.get(KEY)
    return {**stored, KEY: {**(ours if isinstance(ours, Mapping) else {}), part: dict(values)}}
