"""What the model answered, and what the probe's rules made a run do: `probe`, `trigger`, `stop`.

`rollback`, which a rule asks for, too, stands beside the merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...evaluation.measure import PROBE_COLUMNS, columns
from ...evaluation.probe import Answers
from ...evaluation.units import SHARE, unit_of, within_share
from ..history import Event, History, Measured, Probe
from .values import count, number


def probe_entry(step: int, when: str, answers: Answers, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the entry of one probe: every measure; `settings` say how the model was asked, at a run's first probe."""
    measures = [columns(measure, PROBE_COLUMNS) for measure in answers.measures]
    figures = {"when": when, "seconds": answers.seconds, "measures": measures}
    how = {} if settings is None else {"settings": dict(settings)}
    return {"kind": "probe", "step": step, **figures, "mean_tokens": answers.mean_tokens, **how}


def read_probe(history: History, entry: Mapping[str, Any]) -> None:
    """One probe more."""
    measures = tuple(_measured(measure) for measure in entry["measures"])
    seconds, tokens = number(entry["seconds"]), number(entry.get("mean_tokens"))
    settings = dict(entry.get("settings") or {})
    history.probes.append(Probe(count(entry["step"]), str(entry["when"]), seconds, measures, tokens, settings))
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
    value, low, high = (number(measure[key]) for key in ("value", "low", "high"))
    counts = (count(measure.get(key) or 0) for key in ("incoherent", "unjudged", "thoughts", "unfinished"))
    incoherent, unjudged, thoughts, unfinished = counts
    name, kind = str(measure["measure"]), str(measure["kind"])
    unit = unit_of(name, kind, measure.get("unit"))
    n = count(measure["n"] or 0)
    texts = (str(measure.get(key) or "") for key in ("outcomes", "prompts"))
    return Measured(name, kind, n, value, low, high, incoherent, unjudged, unit, thoughts, unfinished, *texts)


def trigger_entry(step: int, reason: str) -> dict[str, Any]:
    """Return the entry of a check, and a merge, that a probe asked for."""
    return {"kind": "trigger", "step": step, "reason": reason}


def stop_entry(step: int, reason: str) -> dict[str, Any]:
    """Return the entry of a training that a probe ended."""
    return {"kind": "stop", "step": step, "reason": reason}


def read_rule(history: History, entry: Mapping[str, Any]) -> None:
    """One event more."""
    history.events.append(Event(count(entry["step"]), str(entry["kind"]), str(entry["reason"])))
