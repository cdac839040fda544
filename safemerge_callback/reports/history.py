"""A journal as a history: module x step -> what was read there, and whether it was merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..decision import JOURNAL_FILE, KNOB, read_journal
from ..errors import JournalError


class Cell(NamedTuple):
    """One module at one check.

    `state` is `measured`, `broken` (an update that is not finite: the cosine is NaN), or `still` (it has not moved, or
    aligned and unaligned are equal there: the cosine is 1.0 by convention and says nothing).
    """

    cosine: float
    null_cosine: float
    state: str


@dataclass
class History:
    """What happened in a run, by module and step; `read_history` makes it.

    `cells`: (module, step) -> reading; where a step was checked twice, the later one. `merges`: (module, step) -> the
    share of the task's update that was left after it. `gate`, `threshold`, `num_layers` and `knob` (the one that says
    how much another gate merges): of the last check; `how`: of the last merge. `faults`: one line each. `seconds`:
    spent on checks and merges.
    """

    title: str
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    merges: dict[tuple[str, int], float] = field(default_factory=dict)
    gate: str = ""
    threshold: float = math.nan
    num_layers: int | None = None
    knob: float | None = None
    how: str = ""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @cached_property
    def modules(self) -> list[str]:
        """Every module, in the order of the journal."""
        return list(dict.fromkeys(name for name, _ in [*self.cells, *self.merges]))

    @cached_property
    def steps(self) -> list[int]:
        """Every step that was checked, ascending."""
        return sorted({step for _, step in [*self.cells, *self.merges]})

    @property
    def rule(self) -> str:
        """The gate in words, as `threshold 0.35`."""
        own = "" if self.knob is None else f" {self.knob:g}"
        knob = {"threshold": f" {self.threshold:g}", "num_layers": f" {self.num_layers}"}.get(self.gate, own)
        return f"gate {self.gate}{knob}"

    @cached_property
    def merged_modules(self) -> set[str]:
        """Every module that was merged at least once."""
        return {name for name, _ in self.merges}


def read_history(source: str | Path) -> History:
    """Return the history of a journal file, or of the run folder that holds `safemerge.jsonl`.

    Raises JournalError when there is no journal, when it holds no check yet, or when an entry is not one of ours.
    """
    path = _journal_in(Path(source).expanduser())
    resolved = path.resolve()
    history = History(resolved.parent.name if resolved.name == JOURNAL_FILE else resolved.stem)
    for number, entry in enumerate(read_journal(path), 1):
        try:
            # A start, an end, or a kind that a later release adds: nothing to show.
            if entry["kind"] in _READERS:
                _READERS[entry["kind"]](history, entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise JournalError(f"journal {str(path)!r}, line {number}: not an entry of ours ({error!r}).") from error
    if not history.cells:
        raise JournalError(f"journal {str(path)!r} holds no check yet: there is nothing to report.")
    return history


def _journal_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / JOURNAL_FILE).is_file():
        return path / JOURNAL_FILE
    below = sorted(path.glob(f"*/{JOURNAL_FILE}"))
    hint = f"; there is one in {below[0].parent.name!r}" if below else ""
    raise JournalError(f"folder {str(path)!r} holds no {JOURNAL_FILE}{hint}: give a run's folder, or the journal.")


def _check(history: History, entry: Mapping[str, Any]) -> None:
    history.gate, history.num_layers = str(entry["gate"]), entry.get("num_layers")
    history.threshold = _number(entry["threshold"])
    history.knob = entry.get(KNOB.get(history.gate, ""))
    history.seconds += _number(entry["seconds"])
    for module in entry["modules"]:
        history.cells[str(module["name"]), int(entry["step"])] = _cell(module)


def _merge(history: History, entry: Mapping[str, Any]) -> None:
    live, safety = entry["weights"]
    history.how = f"method {entry['method']}, space {entry['space']}, weights {live:g} / {safety:g}"
    history.seconds += _number(entry["seconds"])
    for module in entry["modules"]:
        history.merges[str(module["name"]), int(entry["step"])] = _number(module["task_weight"])


def _error(history: History, entry: Mapping[str, Any]) -> None:
    history.faults.append(f"step {entry['step']}, {entry['where']}: {entry['error']}")


_READERS = {"check": _check, "merge": _merge, "error": _error}


def _cell(module: Mapping[str, Any]) -> Cell:
    cosine, null = _number(module["cosine"]), _number(module["null_cosine"])
    if not (math.isfinite(cosine) and math.isfinite(_number(module["update_norm"]))):
        return Cell(math.nan, null, "broken")
    alike = cosine == 1.0 and null == 1.0
    return Cell(cosine, null, "still" if module["update_norm"] == 0 or alike else "measured")


def _number(value: Any) -> float:
    """JSON has no NaN: the journal writes null."""
    return math.nan if value is None else float(value)


def counted(things: Sized, noun: str) -> str:
    """Return `1 merge`, `2 merges`."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
