"""The lower part of the page: what happened in the run, what it took, and what it was made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...record.history import History
from ..counted import counted


def happenings(history: History) -> list[tuple[int | None, str, str]]:
    """Return (step, what, in words) of merges, rules and faults, by step."""
    merged: dict[int, list[str]] = {}
    for name, step in history.merges:
        merged.setdefault(step, []).append(name)
    found: list[tuple[int | None, str, str]] = [
        (step, "merge", f"{counted(names, 'module')}: {_some(names)}") for step, names in merged.items()
    ]
    found += [(e.step, e.kind, f"{e.reason}{_touched(e.modules)}") for e in history.events]
    found += [(int(s["step"]), "resume", "the run went on from a checkpoint") for s in history.starts[1:]]
    found += [(None, "fault", text) for text in history.faults]
    return sorted(found, key=lambda happening: math.inf if happening[0] is None else happening[0])


def _touched(modules: Sequence[str]) -> str:
    return f" ({counted(modules, 'module')}: {_some(modules)})" if modules else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def costs(history: History) -> list[tuple[str, str]]:
    """Return what the run's checks, merges and probes took, and which share of the training that was."""
    asked = sum(probe.seconds for probe in history.probes)
    found = []
    if history.steps:
        found.append(("checks", f"{seconds_text(history.check_seconds)} for {counted(history.steps, 'step')}"))
        found.append(("merges", f"{seconds_text(history.merge_seconds)} for {counted(history.merges, 'module merge')}"))
    if history.probes:
        found.append(("probes, beside the training", f"{seconds_text(asked)} for {counted(history.probes, 'probe')}"))
    if share_text(history):
        # More than its parts: the trackers, the state files and the digests of the weights take their time too.
        found.append(("all but the probes", f"{seconds_text(history.end['seconds'])}, {share_text(history)}"))
    return found


def share_text(history: History) -> str:
    """Return the callback's share of the training, as the journal's last entry has it; empty where there is none."""
    spent, all_of_it = history.end.get("seconds"), history.end.get("training_seconds")
    return (
        f"{spent / all_of_it:.2%} of {seconds_text(all_of_it)} of training" if spent is not None and all_of_it else ""
    )


def seconds_text(seconds: float) -> str:
    """Return a duration as `850 ms`, `1.2 s` or `16.0 min`."""
    if seconds >= 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def sources(history: History) -> dict[str, list[tuple[str, str]]]:
    """Return heading -> (name, value) of what the journal's last start says of the run; nothing where it has none."""
    start = history.starts[-1] if history.starts else {}
    told = {"kind", "version", "config", "versions", "subspace", "placement", "time"}
    run = {key: value for key, value in start.items() if key not in told}
    asked = next((probe.settings for probe in reversed(history.probes) if probe.settings), None)
    parts = {
        "settings": start.get("config"),
        "probe": asked,
        "subspace": start.get("subspace"),
        "placement": start.get("placement"),
        "versions": start.get("versions"),
        "run": {"started": start.get("time"), **run} if start else None,
    }
    return {heading: list(_flat(part)) for heading, part in parts.items() if isinstance(part, Mapping)}


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)
