"""A journal read back: what each of its entries adds to a history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..decision import KNOB
from ..errors import JournalError, shown
from ..evaluation.units import SHARE, unit_of, within_share
from ..io.numbers import is_number, is_whole
from ..record import numbered_entries
from .history import Cell, Event, History, Measured, Probe, journal_in, title_of

# By rounding a cosine may be a little over 1.
_LARGEST_COSINE = 2.0
_DERIVED = ("modules", "steps", "moved", "merged_modules", "task_weights", "by_module")


def read_history(source: str | Path) -> History:
    """Return the history of a journal file, or of the run folder that holds `safemerge.jsonl`.

    Raises JournalError when there is no journal, when it holds no check and no probe yet, or when an entry is not one
    of ours.
    """
    path = journal_in(source)
    history = History(title_of(path))
    for number, entry in numbered_entries(path).items():
        add_entry(history, entry, f"journal {str(path)!r}, line {number}")
    if not history.cells and not history.probes:
        raise JournalError(f"journal {str(path)!r} holds no check yet and no probe: there is nothing to report.")
    return history


def add_entry(history: History, entry: Mapping[str, Any], where: str) -> None:
    """Add one entry to `history`; a kind that a later release writes adds nothing.

    Raises JournalError that begins with `where` for an entry that lacks what its kind has.
    """
    try:
        if entry["kind"] in _READERS:
            _READERS[entry["kind"]](history, entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise JournalError(f"{where}: not an entry of ours ({error!r}).") from error
    for name in _DERIVED:
        history.__dict__.pop(name, None)


def _start(history: History, entry: Mapping[str, Any]) -> None:
    history.starts.append({**entry, "step": _step(entry.get("step", 0))})
    history.end = {}


def _end(history: History, entry: Mapping[str, Any]) -> None:
    seconds = {key: _known(entry.get(key)) for key in ("seconds", "training_seconds")}
    history.end = {**entry, **seconds, **({"step": _step(entry["step"])} if "step" in entry else {})}


def _check(history: History, entry: Mapping[str, Any]) -> None:
    step, num_layers = _step(entry["step"]), entry.get("num_layers")
    history.gate, history.num_layers = str(entry["gate"]), None if num_layers is None else _step(num_layers)
    history.threshold = _number(entry["threshold"])
    history.knob = _known(entry.get(KNOB.get(history.gate, "")))
    history.check_seconds += _number(entry["seconds"])
    history.seconds += _number(entry["seconds"])
    for module in entry["modules"]:
        history.cells[_name(module), step] = _cell(module, _limit(history, module))


def _limit(history: History, module: Mapping[str, Any]) -> float:
    """The cosine that the gate merges below in this module; NaN for a gate that ranks, or takes all or none."""
    if history.gate == "threshold":
        return history.threshold
    if history.gate == "calibrated":
        return _number(module["null_cosine"]) + _number(history.knob) * _number(module.get("null_std"))
    if history.gate == "reference":
        return _number(history.knob) * _number(module.get("reference"))
    return math.nan


def _cell(module: Mapping[str, Any], limit: float) -> Cell:
    cosine, null, norm = (_number(module[key]) for key in ("cosine", "null_cosine", "update_norm"))
    if abs(cosine) > _LARGEST_COSINE or abs(null) > _LARGEST_COSINE:
        raise ValueError(f"cosine {cosine:g} and null cosine {null:g} are none")
    signed = _number(module.get("signed_z"))
    verdict = norm, bool(module.get("merge")), str(module.get("reason", "")), limit, signed
    if not (math.isfinite(cosine) and math.isfinite(norm)):
        return Cell(math.nan, null, "broken", *verdict)
    alike = cosine == 1.0 and null == 1.0
    return Cell(cosine, null, "still" if norm == 0 or alike else "measured", *verdict)


def _merge(history: History, entry: Mapping[str, Any]) -> None:
    weights, step = " / ".join(f"{_number(weight):g}" for weight in entry["weights"]), _step(entry["step"])
    history.how = f"method {entry['method']}, space {entry['space']}, weights {weights}"
    history.merge_seconds += _number(entry["seconds"])
    history.seconds += _number(entry["seconds"])
    for module in entry["modules"]:
        key = _name(module), step
        history.merges[key] = _number(module["task_weight"])
        history.residuals[key] = _number(module.get("residual"))
        history.undone.pop(key, None)


def _taken_back(history: History, entry: Mapping[str, Any]) -> None:
    """A rollback, or an undo by hand: the module has again the share that its merge before this one left."""
    step, names = _step(entry["step"]), tuple(str(name) for name in entry["modules"])
    for name in names:
        shares = [(at, share) for at, share in history.task_weights.get(name, {}).items() if at <= step]
        if shares:
            history.undone[name, shares[-1][0]] = shares[-2][1] if len(shares) > 1 else 1.0
    reason = str(entry.get("reason", "undone by hand"))
    history.events.append(Event(step, str(entry["kind"]), reason, names))


def _rule(history: History, entry: Mapping[str, Any]) -> None:
    history.events.append(Event(_step(entry["step"]), str(entry["kind"]), str(entry["reason"])))


def _probe(history: History, entry: Mapping[str, Any]) -> None:
    measures = tuple(_measured(measure) for measure in entry["measures"])
    seconds, tokens = _number(entry["seconds"]), _number(entry.get("mean_tokens"))
    settings = dict(entry.get("settings") or {})
    history.probes.append(Probe(_step(entry["step"]), str(entry["when"]), seconds, measures, tokens, settings))
    _keep_to_shares(history)


def _keep_to_shares(history: History) -> None:
    """Show a measure that some probe found outside [0, 1] as a plain number at all of them, whatever its unit says."""
    measured = [m for probe in history.probes for m in probe.measures]
    odd = {m.measure for m in measured if not within_share(m.value, m.low, m.high)}
    if any(m.unit == SHARE and m.measure in odd for m in measured):
        history.probes[:] = [probe._replace(measures=_plain(probe.measures, odd)) for probe in history.probes]


def _plain(measures: tuple[Measured, ...], odd: set[str]) -> tuple[Measured, ...]:
    return tuple(m._replace(unit="") if m.unit == SHARE and m.measure in odd else m for m in measures)


def _measured(measure: Mapping[str, Any]) -> Measured:
    value, low, high = (_number(measure[key]) for key in ("value", "low", "high"))
    incoherent, unjudged = (_step(measure.get(key) or 0) for key in ("incoherent", "unjudged"))
    name, kind = str(measure["measure"]), str(measure["kind"])
    unit = unit_of(name, kind, measure.get("unit"))
    return Measured(name, kind, _step(measure["n"] or 0), value, low, high, incoherent, unjudged, unit)


def _error(history: History, entry: Mapping[str, Any]) -> None:
    history.faults.append(f"step {entry['step']}, {entry['where']}: {entry['error']}")


_READERS = {
    "start": _start,
    "check": _check,
    "merge": _merge,
    "probe": _probe,
    "rollback": _taken_back,
    "undo": _taken_back,
    "trigger": _rule,
    "stop": _rule,
    "error": _error,
    "end": _end,
}


def _number(value: Any) -> float:
    """JSON has no NaN: the journal writes null. ValueError for what is no number that a float holds."""
    if value is None or value != value:
        return math.nan
    if not is_number(value):
        raise ValueError(f"{shown(value)} where a number is due")
    return float(value)


def _known(value: Any) -> float | None:
    number = _number(value)
    return None if math.isnan(number) else number


def _name(module: Mapping[str, Any]) -> str:
    """A module's name; ValueError for one that no file and no terminal takes, as half of a pair of surrogates."""
    name = str(module["name"])
    name.encode()
    return name


def _step(value: Any) -> int:
    """A count; ValueError for what is none."""
    number = _number(value)
    if not (number.is_integer() and is_whole(int(number), 0)):
        raise ValueError(f"{shown(value)} where a count is due")
    return int(number)
