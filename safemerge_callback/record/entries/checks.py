"""What was measured, decided and merged, and what was taken back: `check`, `merge`, `rollback`, `undo`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...decision import KNOB, Edit, Gate, MergePlan, Reading
from ..history import MERGE, Cell, Event, History
from ..metrics import limit_of
from .values import count, known, module_name, number
from .version_1 import limit_of_version_1

# By rounding a cosine may be a little over 1.
_LARGEST_COSINE = 2.0


def check_entry(step: int, plan: MergePlan, seconds: float, measured_at: int | None = None) -> dict[str, Any]:
    """Return the entry of one check: every reading with the gate's verdict. `seconds` is the time it took.

    `measured_at` is the step of the weights that were measured, where that is an earlier one.
    """
    modules = [_module(plan, reading) for reading in plan.readings.values()]
    late = {} if measured_at is None else {"measured_at": measured_at}
    return {"kind": "check", "step": step, **gate_entry(plan.gate), "seconds": seconds, "modules": modules, **late}


def _module(plan: MergePlan, reading: Reading) -> dict[str, Any]:
    """What was read in a module, and what the gate made of it."""
    verdict = plan.verdicts[reading.name]
    return {
        "name": reading.name,
        "cosine": reading.cosine,
        "null_cosine": reading.null_cosine,
        "update_norm": reading.update_norm,
        "limit": limit_of(plan, reading),
        "merge": verdict.merge,
        "reason": verdict.reason,
        **({} if reading.signed_z is None else {"signed_z": reading.signed_z}),
        **({"interval": list(reading.interval)} if reading.interval else {}),
        **({"reread": True} if reading.reread else {}),
        **{note: getattr(reading, note) for note in plan.gate.criterion.notes},
        **reading.signals,
    }


def gate_entry(gate: Gate) -> dict[str, Any]:
    """What the journal says of the gate: its name and its knob, and two knobs that every line has."""
    knob = {} if gate.criterion.knob is None else {gate.criterion.knob: gate.knob}
    return {"gate": gate.name, "threshold": gate.threshold, "num_layers": gate.num_layers, **knob}


def how_entry(plan: MergePlan) -> dict[str, Any]:
    """What the journal says of how a plan merges: method, space, weights, and the knobs that were read."""
    how = plan.how
    return {"method": how.method, "space": how.space, "weights": list(how.weights), **plan.taken, **plan.noted}


def read_check(history: History, entry: Mapping[str, Any]) -> None:
    """A cell for every module; the gate is that of the last check."""
    step, num_layers = count(entry["step"]), entry.get("num_layers")
    history.gate, history.num_layers = str(entry["gate"]), None if num_layers is None else count(num_layers)
    history.threshold = number(entry["threshold"])
    history.knob = known(entry.get(KNOB.get(history.gate, "")))
    history.check_seconds += number(entry["seconds"])
    history.seconds += number(entry["seconds"])
    for module in entry["modules"]:
        limit = number(module["limit"]) if "limit" in module else limit_of_version_1(history, module)
        history.cells[module_name(module), step] = _cell(module, limit)


def _cell(module: Mapping[str, Any], limit: float) -> Cell:
    cosine, null, norm = (number(module[key]) for key in ("cosine", "null_cosine", "update_norm"))
    if abs(cosine) > _LARGEST_COSINE or abs(null) > _LARGEST_COSINE:
        raise ValueError(f"cosine {cosine:g} and null cosine {null:g} are none")
    signed = number(module.get("signed_z"))
    verdict = norm, bool(module.get("merge")), str(module.get("reason", "")), limit, signed
    if not (math.isfinite(cosine) and math.isfinite(norm)):
        return Cell(math.nan, null, "broken", *verdict)
    alike = cosine == 1.0 and null == 1.0
    return Cell(cosine, null, "still" if norm == 0 or alike else "measured", *verdict)


def merge_entry(
    step: int,
    plan: MergePlan,
    edits: Sequence[Edit],
    task_weights: Mapping[str, float],
    seconds: float,
    average: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the entry of one merge. `task_weights`: module name -> product of all w_live so far, this one's too.

    `average`: what is told of the run's own, where the method goes to that.
    """
    modules = [
        {
            "name": e.name,
            "residual": e.residual,
            "change": e.change,
            "task_weight": task_weights[e.name],
            **({"weights": list(plan.weights[e.name])} if plan.varied else {}),
            **({} if e.task_outputs is None else {"task_outputs": e.task_outputs, "safety_outputs": e.safety_outputs}),
        }
        for e in edits
    ]
    goal = {} if average is None else {"average": dict(average)}
    return {"kind": "merge", "step": step, **how_entry(plan), "seconds": seconds, "modules": modules, **goal}


def read_merge(history: History, entry: Mapping[str, Any]) -> None:
    """The share of the task's update that is left in every module, and what of the merged one did not fit the rank."""
    weights = " / ".join(f"{number(weight):g}" for weight in entry["weights"])
    history.how = f"method {entry['method']}, space {entry['space']}, weights {weights}"
    history.merge_seconds += number(entry["seconds"])
    history.seconds += number(entry["seconds"])
    read_shares(history, entry, MERGE)


def read_shares(history: History, entry: Mapping[str, Any], correction: str) -> None:
    """What a correction left in each module, and what of the new update did not fit."""
    step, left = count(entry["step"]), history.task_weights
    for module in entry["modules"]:
        key = module_name(module), step
        others = [name for name in history.corrections_at(*key) if name != correction]
        if others or correction != MERGE:
            history.corrections[key] = (*others, correction)
        history.before[key] = next(reversed(left.get(key[0], {}).values()), 1.0)
        history.merges[key] = number(module["task_weight"])
        history.residuals[key] = number(module.get("residual"))
        history.undone.pop(key, None)


def rollback_entry(step: int, modules: Iterable[str], reason: str) -> dict[str, Any]:
    """Return the entry of a merge that a rule of the probe took back in the run."""
    return {"kind": "rollback", "step": step, "modules": list(modules), "reason": reason}


def undo_entry(step: int, folder: str, modules: Iterable[str]) -> dict[str, Any]:
    """Return the entry of a run's final merge, of `step`, that was taken back by hand in the adapter of `folder`."""
    return {"kind": "undo", "step": step, "folder": folder, "modules": list(modules)}


def undo_noted(entries: Iterable[Mapping[str, Any]], undo: Mapping[str, Any]) -> bool:
    """Whether a journal's entries tell of this undoing, and of no merge at that step since."""
    noted = False
    for old in entries:
        if old.get("kind") == "merge" and old.get("step") == undo["step"]:
            noted = False
        noted |= all(old.get(key) == undo[key] for key in ("kind", "step", "folder"))
    return noted


def read_taken_back(history: History, entry: Mapping[str, Any]) -> None:
    """A rollback, or an undo by hand: the module has again the share that its merge before this one left."""
    step, names = count(entry["step"]), tuple(str(name) for name in entry["modules"])
    for name in names:
        last = max((at for at in history.task_weights.get(name, {}) if at <= step), default=None)
        if last is not None:
            history.undone[name, last] = history.before[name, last]
    reason = str(entry.get("reason", "undone by hand"))
    history.events.append(Event(step, str(entry["kind"]), reason, names))
