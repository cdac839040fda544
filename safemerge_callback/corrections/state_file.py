"""Small state of a correction in a checkpoint's folder, as JSON: written whole, read back by the save that it is of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import AdapterError
from ..io.whole_file import whole_file

State = TypeVar("State")


def write_state(path: Path, save: str, state: Mapping[str, Any]) -> None:
    """Write a state as part of `save`, whole or not at all. Raises OSError."""
    with whole_file(path) as place:
        place.write_text(json.dumps({"save": save, **state}) + "\n", encoding="utf-8")


def read_state(
    folders: Sequence[Path], name: str, save: str | None, read: Callable[[Mapping[str, Any]], State], loss: str
) -> State | None:
    """Return what `read` makes of the state that `save` (None: any) wrote into the first folder that has it, or None.

    AdapterError for a file that cannot be read, and where `read` raises KeyError, TypeError or ValueError; `loss` says
    what is not known then.
    """
    for path in (folder / name for folder in folders):
        if not path.is_file():
            continue
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if save is None or state["save"] == save:
                return read(state)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(
                f"{str(path)!r} cannot be read ({error}), so it is not known {loss}: take another checkpoint"
            ) from error
    return None
