"""What a cell's journal says, short enough to stay with its result: merges a module, cosines and probes by step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from safemerge_callback.record import JOURNAL_FILE, read_journal


def trail_of(adapter: Path | None) -> dict[str, Any] | None:
    """Return the trail of an adapter's journal; None where there is no adapter or journal.

    modules: how many were measured. merged: module -> how often. task_weight: mean share of the task's update left.
    checks: [step, mean cosine] and probes: [step, {measure: value}], in the journal's order.
    """
    journal = None if adapter is None else adapter / JOURNAL_FILE
    if journal is None or not journal.is_file():
        return None
    entries = read_journal(journal)
    merges = [entry for entry in entries if entry["kind"] == "merge"]
    left = {module["name"]: module["task_weight"] for entry in merges for module in entry["modules"]}
    modules = max((entry.get("num_modules", 0) for entry in entries if entry["kind"] == "start"), default=0)
    return {
        "modules": modules,
        "merges": len(merges),
        "merged": dict(Counter(module["name"] for entry in merges for module in entry["modules"])),
        "task_weight": (sum(left.values()) + modules - len(left)) / modules if modules else None,
        "checks": [[e["step"], _mean_cosine(e)] for e in entries if e["kind"] == "check"],
        "probes": [[e["step"], _values(e)] for e in entries if e["kind"] == "probe" and e.get("when") != "before"],
    }


def _mean_cosine(check: dict[str, Any]) -> float | None:
    found = [module["cosine"] for module in check["modules"] if module["cosine"] is not None]
    return sum(found) / len(found) if found else None


def _values(probe: dict[str, Any]) -> dict[str, float | None]:
    return {measure["measure"]: measure["value"] for measure in probe["measures"]}
