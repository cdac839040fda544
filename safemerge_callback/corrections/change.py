"""A change of a run's factors, watched: the factors as they were are kept until nobody wants them back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..adapters.snapshot import Snapshot, norms_of, save_snapshot
from ..decision import Edit
from ..live import Writer
from ..live.faults import Fault, attempt
from ..live.fingerprint import digest
from ..live.optimizer import copy_optimizer_states, edit_moments
from ..live.ranks import agree, everyones, from_first, many
from ..ops import LowRank
from ..record.entries import rollback_entry
from ..record.log import Log
from .protocol import Change, Correction, RunPoint

# What a change alters of the progress, so what taking it back must put back.
OF_A_CHANGE = ("merges", "modules_merged", "merged_steps", "last_merge", "task_weights", "disarmed")


class Witness(Protocol):
    """Looks at the model before and after each change, on every rank alike; raises nothing but a ProcessesError."""

    def before_merge(self, step: int) -> None:
        """The change of optimizer step `step` is about to be written."""

    def after_merge(self, step: int) -> str | None:
        """It was written; return why it must be taken back, or None."""

    def closing(self) -> None:
        """Nothing will change the weights any more."""


@dataclass(frozen=True)
class StateBefore:
    """The changed modules' factors as they were, what puts their optimizer state back, and the counts."""

    factors: Mapping[str, LowRank]
    put_states_back: Callable[[], None] | None
    progress: Mapping[str, Any]


@dataclass
class ChangeEngine:
    """Writes changes into a run: all of one or nothing, on every rank alike, recorded, and taken back if need be.

    `optimizer_state`: what becomes of the moments of changed modules, `keep`, `reset` or `rescale`. It knows no
    correction by name.
    """

    writer: Writer
    optimizer: Any
    optimizer_state: str
    log: Log
    witness: Witness | None = None

    def make(self, correction: Correction, at: RunPoint, keep_in: Path | None = None) -> tuple[Edit, ...]:
        """Write what `correction` wants. After a fault, or when the witness has it taken back, nothing is changed.

        With `keep_in`, the factors as they were are kept there, so that the change can be undone. Raises
        ProcessesError, which ends training, where the ranks do not end with equal factors.
        """
        began = time.perf_counter()
        change = _agreed(correction.name, at.step, attempt(correction.name, lambda: correction.change(at)))
        if isinstance(change, Fault):
            report_failure(self.log, at.step, change)
            return ()
        if change is None:
            return ()
        computed = time.perf_counter() - began
        if self.witness:
            self.witness.before_merge(at.step)
        began = time.perf_counter() - computed
        before = attempt(correction.name, lambda: self._write(change.new))
        if isinstance(before, Fault):
            report_failure(self.log, at.step, before)
            return ()
        # The figures of one rank are those of all, as its factors are.
        edits, shares = from_first((change.edits, dict(change.task_weights)))
        edits = self._conclude(change._replace(edits=edits, task_weights=shares), at.step, before, began, keep_in)
        if edits and not change.merge:
            self.log.progress.record_correction(correction.name)
        return edits

    def _write(self, new: Mapping[str, LowRank]) -> StateBefore:
        """Write, and return what was there before."""
        before = self._before(new)
        self.writer.write(new)
        return before

    def _before(self, new: Mapping[str, LowRank]) -> StateBefore:
        """What the change will alter, as it is."""
        live = self.writer.gather()
        factors = {name: LowRank(f.A.clone(), f.B.clone()) for name, f in live.items() if name in new}
        states = None
        if self.witness and self.optimizer is not None and self.optimizer_state != "keep":
            parameters = [p for pair in self.writer.parameters(factors).values() for p in pair]
            states = copy_optimizer_states(self.optimizer, parameters)
        return StateBefore(factors, states, {name: deepcopy(getattr(self.log.progress, name)) for name in OF_A_CHANGE})

    def _conclude(
        self, change: Change, step: int, before: StateBefore, began: float, keep_in: Path | None
    ) -> tuple[Edit, ...]:
        """See to all that follows from a change that was written at `step`; nothing is left of one taken back."""
        log, progress = self.log, self.log.progress
        after = {name: factors for name, factors in self.writer.gather().items() if name in before.factors}
        if many():
            agree(f"the factors merged at step {step}", digest(after))
        edited = edit_moments(self.writer, self.optimizer, self.optimizer_state, before.factors, after)
        if isinstance(edited, Fault):
            # The change stands whatever happens to the moments.
            log.fault(step, edited, f"the optimizer's state was kept at step {step}: {edited.error}")
        if change.merge:
            progress.record_merge(step, change.task_weights)
        else:
            progress.record_change(change.task_weights)
        took, shares = time.perf_counter() - began, progress.task_weights
        log.tell(step, lambda: log.note(change.entry(shares, took)))
        reason = self.witness.after_merge(step) if self.witness else None
        if reason and self._taken_back(step, before, reason):
            return ()
        if keep_in and log.first_rank:
            _keep(log, keep_in, Snapshot(step, before.factors, norms_of(after)))
        return change.edits

    def _taken_back(self, step: int, before: StateBefore, reason: str) -> bool:
        """Put everything back as it was before the change, through the same writer; False where that fails."""

        def put_back() -> None:
            self.writer.write(before.factors)
            if before.put_states_back:
                before.put_states_back()

        fault = attempt("rollback", put_back)
        if isinstance(fault, Fault):
            words = f"the merge at step {step} could not be taken back and stands: {fault.error}"
            self.log.fault(step, fault, words)
            return False
        if many():
            now = {name: f for name, f in self.writer.gather().items() if name in before.factors}
            agree(f"the factors put back at step {step}", digest(now))
        for name, value in before.progress.items():
            setattr(self.log.progress, name, value)
        self.log.note(rollback_entry(step, before.factors, reason))
        self.log.say(f"step {step:,}: the merge was taken back: {reason}")
        return True


def report_failure(log: Log, step: int, fault: Fault) -> None:
    """Record that a check or a change failed, and tell everybody of it."""
    message = f"{fault.where} failed at step {step}, nothing was merged, training goes on: {fault.error}"
    log.fault(step, fault, message, alert="a check failed")


def _agreed(name: str, step: int, change: Change | Fault | None) -> Change | Fault | None:
    """One rank's fault is every rank's; ProcessesError where they would change different modules. Collective."""
    if not many():
        return change
    faults = everyones(change if isinstance(change, Fault) else None)
    for rank, fault in enumerate(faults):
        if fault is not None:
            return fault if None not in faults else replace(fault, error=f"{fault.error} (on rank {rank})")
    agree(f"what {name} changes at step {step}", ", ".join(change.new) if isinstance(change, Change) else "nothing")
    return change


def _keep(log: Log, run: Path, snapshot: Snapshot) -> None:
    try:
        save_snapshot(run, snapshot)
    except OSError as error:
        log.warn("snapshot", f"the factors before the final merge could not be kept ({error}): no undo")
