"""What a model card says of the safety probe: the model's answers before training and as it is by now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import JournalError
from ...io.card import escaped
from ...record import read_journal
from ...record.entries.probes import read_probe
from ...record.history import History, Probe


class ProbePair(NamedTuple):
    """The first probe of a run and the one of the weights as they are; `settings` of all that say how they asked."""

    first: Probe
    last: Probe
    settings: tuple[Mapping[str, Any], ...]


def probes_in(journal: Path) -> ProbePair | None:
    """Return what the journal at `journal` tells of probes; None where it tells of none, or cannot be read.

    After a merge that was taken back the weights are those that were asked before it.
    """
    history, before, last = History(""), None, None
    try:
        for entry in read_journal(journal):
            if entry["kind"] == "probe":
                read_probe(history, entry)
                last = history.probes[-1]
                before = last if last.when == "before" else before
            elif entry["kind"] == "rollback":
                last = before or last
    except (JournalError, KeyError, TypeError, ValueError, AttributeError):
        return None
    settings = tuple(probe.settings for probe in history.probes if probe.settings)
    return ProbePair(history.probes[0], last, settings) if last is not None else None


def probe_rows(probes: ProbePair) -> list[str]:
    """Return a sentence on how the model was asked, and a table: a measure, before training, and now, each with its n.

    Names from outside are escaped.
    """
    first, last = probes.first, probes.last
    once = (first.step, first.when) == (last.step, last.when)
    when = f"At step {first.step}" if once else f"At step {first.step} and, as it is now, at step {last.step}"
    judges = _names(probes.settings, "judge")
    benign = _names(probes.settings, "benign_judge")
    who = f"judge {judges}" + (f", of harmless prompts {benign}" if benign != judges else "") if judges else "judged"
    heads = [f"step {probe.step}" for probe in ([first] if once else [first, last])]
    now = {measured.measure: measured.text for measured in last.measures}
    rows = [[m.measure, m.text, *([] if once else [now.get(m.measure, "not known")])] for m in first.measures]
    top, *body = [f"| {' | '.join(map(escaped, row))} |" for row in [["measure", *heads], *rows]]
    line = f"|---|{'---|' * len(heads)}"
    return [f"{when} the model was asked ({escaped(who)}; 95 % intervals):\n", top, line, *body, ""]


def _names(settings: Sequence[Mapping[str, Any]], key: str) -> str:
    """Who judged; after a resume it may be another."""
    return ", then ".join(dict.fromkeys(str(one[key]) for one in settings if one.get(key)))
