"""What the probe's rules made a run do: `trigger`, `stop` (and `rollback`, which stands beside the merge)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..history import Event, History
from .values import count


def trigger_entry(step: int, reason: str) -> dict[str, Any]:
    """Return the entry of a check, and a merge, that a probe asked for."""
    return {"kind": "trigger", "step": step, "reason": reason}


def stop_entry(step: int, reason: str) -> dict[str, Any]:
    """Return the entry of a training that a probe ended."""
    return {"kind": "stop", "step": step, "reason": reason}


def read_rule(history: History, entry: Mapping[str, Any]) -> None:
    """One event more."""
    history.events.append(Event(count(entry["step"]), str(entry["kind"]), str(entry["reason"])))
