"""A merge as a correction: what a check has planned becomes new factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..adapters import Adapter
from ..decision import agreed_factors
from ..record import merge_entry
from .average import RunAverage
from .protocol import Change, RunPoint
from .schedule import Schedule

# What it is called in the journal, and in a list of corrections.
MERGE = "merge"


@dataclass(frozen=True)
class Merge:
    """Merges by the plan of a check: toward the run's own average where it keeps one, else with the safety adapters."""

    schedule: Schedule
    average: RunAverage | None = None
    name: str = MERGE

    def sources(self, at: RunPoint) -> Sequence[Adapter]:
        """Return what the plan's method merges in. Collective as `Writer.gather` where there is an average."""
        return at.safety if self.average is None else (self.average.adapter(at.factors()),)

    def change(self, at: RunPoint) -> Change | None:
        """Return the merge of the modules that the plan selects; None where it selects none. Raises as `apply`."""
        plan = at.plan
        if plan is None or not plan.selected:
            return None
        new, edits = agreed_factors(plan, at.writer, self.sources(at), at.subspace, grams=at.grams)
        shares, about = {name: plan.task_weight_of(name) for name in plan.selected}, self.average
        return Change(
            new,
            edits,
            shares,
            lambda left, seconds: merge_entry(
                at.step, plan, edits, left, seconds, None if about is None else about.entry()
            ),
            merge=True,
        )
