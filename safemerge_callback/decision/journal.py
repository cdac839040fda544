"""An append-only journal, one JSON object a line: every reading, decision and edit. It survives a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import JournalError
from .apply import Edit
from .gates import KNOB
from .plan import MergePlan

VERSION = 1
JOURNAL_FILE = "safemerge.jsonl"


class Journal:
    """A journal at `path`, opened for appending; its folder is made if need be.

    With `enabled=False` (every rank but the first) nothing is touched. What a crash left of a last line is cut off, so
    that a resumed run goes on with whole lines. Raises JournalError if the file cannot be written or is no journal.
    """

    def __init__(self, path: str | Path, enabled: bool = True) -> None:
        self.path = Path(path).expanduser()
        self.enabled = enabled
        if enabled:
            _open(self.path)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry with the time (ISO 8601, UTC) added, and wait until it is on disk.

        NaN and infinities become null. Raises JournalError for values that JSON has no word for, and where the disk
        refuses.
        """
        if not self.enabled:
            return
        stamped = {**entry, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        try:
            line = json.dumps(_plain(stamped), allow_nan=False, ensure_ascii=False) + "\n"
        except TypeError as error:
            raise JournalError(f"journal entry {entry.get('kind')!r} cannot be written as JSON: {error}") from error
        try:
            _append(self.path, line.encode())
        except OSError as error:
            raise JournalError(f"journal {str(self.path)!r} cannot be written: {error.strerror}") from error


def _append(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _open(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise JournalError(
            f"journal {str(path)!r} cannot be written: {error.strerror}. Set `journal` to a file that can."
        ) from error
    _, tail = _parse(path)
    if tail.strip(b"\0") and not tail.startswith(b"{"):
        raise JournalError(f"{str(path)!r} exists and is no journal. Set `journal` to another file.")
    if tail:
        os.truncate(path, path.stat().st_size - len(tail))


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Return the entries in order; a last line that a crash cut short is dropped.

    Raises JournalError if there is no such file, or with its number for any other line that is not a JSON object.
    """
    return _parse(Path(path).expanduser())[0]


def _parse(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """The entries of all whole lines, and what follows the last newline."""
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise JournalError(f"journal {str(path)!r} cannot be read: {error.strerror}") from error
    return [_entry(line, number, path) for number, line in enumerate(lines, 1)], tail


def _entry(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise JournalError(f"journal {str(path)!r}, line {number}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise JournalError(f"journal {str(path)!r}, line {number}: not a JSON object but {type(entry).__name__}")
    return entry


def _plain(value: Any) -> Any:
    """`value` as JSON has it: NaN and infinities are None, paths are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_entry(step: int, plan: MergePlan, seconds: float) -> dict[str, Any]:
    """Return the entry of one check: every reading with the gate's verdict. `seconds` is the time it took."""
    modules = [
        {
            "name": name,
            "cosine": reading.cosine,
            "null_cosine": reading.null_cosine,
            "update_norm": reading.update_norm,
            "merge": plan.verdicts[name].merge,
            "reason": plan.verdicts[name].reason,
            **({} if reading.signed_z is None else {"signed_z": reading.signed_z}),
            **({"interval": list(reading.interval)} if reading.interval else {}),
            **({"reread": True} if reading.reread else {}),
            **({"null_std": reading.null_std} if plan.gate == "calibrated" else {}),
            **({"reference": reading.reference} if plan.gate == "reference" else {}),
        }
        for name, reading in plan.readings.items()
    ]
    gate = {"gate": plan.gate, "threshold": plan.threshold, "num_layers": plan.num_layers}
    if plan.gate in KNOB:
        gate[KNOB[plan.gate]] = plan.rule.knob
    return {"kind": "check", "step": step, **gate, "seconds": seconds, "modules": modules}


def merge_entry(
    step: int, plan: MergePlan, edits: Sequence[Edit], task_weights: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Return the entry of one merge. `task_weights`: module name -> product of all w_live so far, this one's too."""
    modules = [
        {
            "name": e.name,
            "residual": e.residual,
            "change": e.change,
            "task_weight": task_weights[e.name],
            **({"weights": list(plan.weights_of(e.name))} if plan.varied else {}),
        }
        for e in edits
    ]
    how = {"method": plan.method, "space": plan.space, "weights": list(plan.weights), **plan.taken}
    if plan.module_weights:
        how["module_weights"] = {pattern: list(own) for pattern, own in plan.module_weights.items()}
    return {"kind": "merge", "step": step, **how, "seconds": seconds, "modules": modules}
