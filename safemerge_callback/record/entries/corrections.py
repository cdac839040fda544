"""What other corrections than the merge did to a run: `change`, `gradient`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...decision import Edit
from ..history import History, TermReading
from .checks import read_shares
from .values import count, number


def change_entry(
    step: int, correction: str, edits: Sequence[Edit], task_weights: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Return the entry of a change that is no merge; `task_weights` as `merge_entry`, where the change leaves one."""
    modules = [
        {"name": e.name, "residual": e.residual, "change": e.change, "task_weight": task_weights.get(e.name, 1.0)}
        for e in edits
    ]
    return {"kind": "change", "step": step, "correction": correction, "seconds": seconds, "modules": modules}


def read_change(history: History, entry: Mapping[str, Any]) -> None:
    """The modules' shares go on from it as from a merge, and a rollback takes it back."""
    correction, seconds = str(entry["correction"]), number(entry["seconds"])
    history.seconds += seconds
    history.change_seconds[correction] = history.change_seconds.get(correction, 0.0) + seconds
    read_shares(history, entry, correction)


def gradient_entry(step: int, correction: str, reading: TermReading) -> dict[str, Any]:
    """Return the entry of a gradient term over so many steps up to this one; what is not known is left out."""
    entry = {"kind": "gradient", "step": step, "correction": correction, "weight": reading.weight, "loss": reading.loss}
    entry |= {"steps": reading.steps, "seconds": reading.seconds}
    entry |= {key: value for key in ("norm", "cosine") if not math.isnan(value := getattr(reading, key))}
    return entry | ({"figures": dict(reading.figures)} if reading.figures else {})


def read_gradient(history: History, entry: Mapping[str, Any]) -> None:
    """One reading more of its term; lines of before had no seconds."""
    numbers = {key: number(entry.get(key)) for key in ("seconds", "norm", "cosine")}
    figures = {str(name): number(value) for name, value in entry.get("figures", {}).items()}
    reading = TermReading(
        number(entry["weight"]), number(entry["loss"]), count(entry["steps"]), **numbers, figures=figures
    )
    history.terms.setdefault(str(entry["correction"]), {})[count(entry["step"])] = reading
