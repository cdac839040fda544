"""A merge during training, watched: the factors as they were are kept until nobody wants them back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..adapters.snapshot import Snapshot, norms_of, save_snapshot
from ..decision import Edit, MergePlan, apply
from ..live.faults import Fault, attempt
from ..live.fingerprint import digest
from ..live.optimizer.copy import copy_optimizer_states
from ..live.optimizer.moments import edit_moments
from ..live.ranks import agree, many
from ..ops import LowRank
from ..record.entries import merge_entry, rollback_entry
from .averaging import sources
from .run.lines import rollback_line

if TYPE_CHECKING:
    from .run.session import Session

# What a merge changes of the progress, so what taking it back must put back.
OF_A_MERGE = ("merges", "modules_merged", "merged_steps", "last_merge", "task_weights", "disarmed")


class Witness(Protocol):
    """Looks at the model before and after each merge, on every rank alike; raises nothing but a ProcessesError."""

    def before_merge(self, step: int) -> None:
        """The merge of optimizer step `step` is about to be applied."""

    def after_merge(self, step: int) -> str | None:
        """It was applied; return why it must be taken back, or None."""

    def closing(self) -> None:
        """Nothing will change the weights any more."""


@dataclass(frozen=True)
class Before:
    """The merged modules' factors as they were, what puts their optimizer state back, and the counts."""

    factors: Mapping[str, LowRank]
    put_states_back: Callable[[], None] | None
    progress: Mapping[str, Any]


def merge(session: Session, step: int, plan: MergePlan, keep_in: Path | None) -> tuple[Edit, ...]:
    """Apply `plan` on every rank. After a fault, or when the witness has it taken back, nothing is merged.

    With `keep_in`, the factors as they were are kept there, so that the merge can be undone. Raises
    ProcessesError, which ends training, where the ranks do not end with equal factors.
    """
    if session.witness:
        session.witness.before_merge(step)
    began = time.perf_counter()
    writer = session.writer
    done = attempt("merge", lambda: (_before(session, plan), apply(plan, writer, sources(session), session.subspace)))
    if isinstance(done, Fault):
        message = f"{done.where} failed at step {step}, nothing was merged, training goes on: {done.error}"
        session.log.fault(step, done, message, alert="a check failed")
        return ()
    before, edits = done
    after = {name: factors for name, factors in writer.gather().items() if name in before.factors}
    if many():
        agree(f"the factors merged at step {step}", digest(after))
    policy = session.config.optimizer_state
    edited = edit_moments(writer, session.optimizer, policy, before.factors, after)
    if isinstance(edited, Fault):
        # The merge stands whatever happens to the moments.
        session.log.fault(step, edited, f"the optimizer's state was kept at step {step}: {edited.error}")
    session.progress.record_merge(step, {name: plan.task_weight_of(name) for name in plan.selected})
    took, shares = time.perf_counter() - began, session.progress.task_weights
    session.log.tell(step, lambda: session.log.note(merge_entry(step, plan, edits, shares, took, session.average)))
    reason = session.witness.after_merge(step) if session.witness else None
    if reason and _taken_back(session, step, before, reason):
        return ()
    if keep_in and session.log.first_rank:
        _keep(session, keep_in, Snapshot(step, before.factors, norms_of(after)))
    return edits


def _before(session: Session, plan: MergePlan) -> Before:
    """What the plan will change, as it is."""
    live, chosen = session.writer.gather(), set(plan.selected)
    factors = {name: LowRank(f.A.clone(), f.B.clone()) for name, f in live.items() if name in chosen}
    states = None
    if session.witness and session.optimizer is not None and session.config.optimizer_state != "keep":
        parameters = [p for pair in session.writer.parameters(factors).values() for p in pair]
        states = copy_optimizer_states(session.optimizer, parameters)
    return Before(factors, states, {name: deepcopy(getattr(session.progress, name)) for name in OF_A_MERGE})


def _taken_back(session: Session, step: int, before: Before, reason: str) -> bool:
    """Put everything back as it was before the merge, through the writer that merged; False where that fails."""

    def put_back() -> None:
        session.writer.write(before.factors)
        if before.put_states_back:
            before.put_states_back()

    fault = attempt("rollback", put_back)
    if isinstance(fault, Fault):
        words = f"the merge at step {step} could not be taken back and stands: {fault.error}"
        session.log.fault(step, fault, words)
        return False
    if many():
        now = {name: f for name, f in session.writer.gather().items() if name in before.factors}
        agree(f"the factors put back at step {step}", digest(now))
    for name, value in before.progress.items():
        setattr(session.progress, name, value)
    session.log.note(rollback_entry(step, before.factors, reason))
    session.log.say(rollback_line(step, reason))
    return True


def _keep(session: Session, run: Path, snapshot: Snapshot) -> None:
    try:
        save_snapshot(run, snapshot)
    except OSError as error:
        session.log.warn("snapshot", f"the factors before the final merge could not be kept ({error}): no undo")
