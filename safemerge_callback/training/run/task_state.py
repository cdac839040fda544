"""What a checkpoint holds of the task's last rows and of the modules' inputs on them, of every process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...corrections.state_file import read_state, write_state
from ...errors import AdapterError
from ...io.whole_file import whole_file
from ...signals.rows import RowTokens
from ...signals.task_inputs import InputState

ROWS_FILE, INPUTS_FILE = "safemerge_task_rows.json", "safemerge_task_inputs.safetensors"
_LOSS = "what was trained on last"


def write_rows(folder: Path, save: str, ranks: Sequence[Sequence[RowTokens]]) -> None:
    """Write the task rows of each rank, as token ids. Raises OSError."""
    write_state(folder / ROWS_FILE, save, {"ranks": [[[row.prompt, row.response] for row in rows] for rows in ranks]})


def read_rows(folders: Sequence[Path], save: str | None) -> list[list[RowTokens]] | None:
    """Return what `write_rows` wrote as part of `save` (None: any) into the first of these folders that has it.

    AdapterError where it cannot be read.
    """
    return read_state(folders, ROWS_FILE, save, _ranks, _LOSS)


def _ranks(state: Mapping[str, Any]) -> list[list[RowTokens]]:
    return [[_row(*pair) for pair in rows] for rows in state["ranks"]]


def _row(prompt: Any, response: Any) -> RowTokens:
    ids = [tuple(int(token) for token in part) for part in (prompt, response)]
    if not all(ids):
        raise ValueError("a row lacks tokens")
    return RowTokens(ids[0], ids[1], "task")


def write_inputs(folder: Path, save: str, ranks: Sequence[InputState]) -> None:
    """Write the sample of each rank. Raises OSError."""
    tensors = {
        f"{rank}.{name}": torch.cat(parts)
        for rank, state in enumerate(ranks)
        for name, parts in [*state.samples.items(), ("", state.weights)]
        if parts
    }
    about = [
        {
            "lengths": [len(one) for one in state.weights],
            "modules": [name for name, parts in state.samples.items() if len(parts) == len(state.weights) > 0],
            "twins": state.twins,
            "seen": state.seen,
        }
        for state in ranks
    ]
    try:
        with whole_file(folder / INPUTS_FILE) as place:
            save_file(tensors, place, metadata={"save": save, "ranks": json.dumps(about)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_inputs(folders: Sequence[Path], save: str | None) -> list[InputState] | None:
    """Return what `write_inputs` wrote, as `read_rows`."""
    for path in (folder / INPUTS_FILE for folder in folders):
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if save is None or about["save"] == save:
                    return [_state(file, rank, one) for rank, one in enumerate(json.loads(about["ranks"]))]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise AdapterError(
                f"{str(path)!r} cannot be read ({error}), so it is not known {_LOSS}: take another checkpoint"
            ) from error
    return None


def _state(file: Any, rank: int, about: Any) -> InputState:
    lengths = [int(length) for length in about["lengths"]]
    if not lengths:
        return InputState({}, [], {}, 0)
    samples = {name: list(file.get_tensor(f"{rank}.{name}").split(lengths)) for name in about["modules"]}
    weights = list(file.get_tensor(f"{rank}.").split(lengths))
    return InputState(samples, weights, dict(about["twins"]), int(about["seen"]))
