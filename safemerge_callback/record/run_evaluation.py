"""A run's probes as evaluations: what its journal says the model refused, first and last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..evaluation.figures_file import MANNER, Evaluation
from ..evaluation.measure import Kind, Share, as_share
from .entries import read_history
from .history import Measured, Probe


class RunEvaluations(NamedTuple):
    """What a run was measured at before its first step and last, each None where it was not."""

    first: Evaluation | None
    last: Evaluation | None


def run_evaluations(run: Path) -> RunEvaluations:
    """Return the first and the last probe of a run's journal; JournalError for what is none."""
    history = read_history(run)
    if not history.probes:
        return RunEvaluations(None, None)
    first, last = history.probes[0], history.probes[-1]
    # How it was asked stands in the line of a run's beginning, once a resume.
    settings = next((dict(probe.settings) for probe in reversed(history.probes) if probe.settings), {})
    last_figures = _evaluation(f"{run}, step {last.step}", last, settings)
    if first is last or first.step:
        return RunEvaluations(None, last_figures)
    return RunEvaluations(_evaluation(f"{run}, step 0", first, settings), last_figures)


def _evaluation(name: str, probe: Probe, settings: Mapping[str, Any]) -> Evaluation:
    judges = {"harm": settings.get("judge"), "over_refusal": settings.get("benign_judge")}
    manner = {key: settings[key] for key in MANNER if settings.get(key) is not None}
    return Evaluation(name, [_share(one, judges.get(one.kind)) for one in probe.measures], manner=manner)


def _share(figure: Measured, judge: Any) -> Share:
    value, low, high = (None if math.isnan(x) else x for x in (figure.value, figure.low, figure.high))
    names = ("incoherent", "unjudged", "thoughts", "unfinished", "unit", "outcomes", "prompts")
    known: dict[str, Any] = {name: getattr(figure, name) for name in names}
    who = judge if isinstance(judge, str) else None
    return as_share(figure.measure, cast("Kind", figure.kind), value, figure.n or None, low, high, judge=who, **known)
