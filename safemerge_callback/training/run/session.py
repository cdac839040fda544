"""One training run under guard: the verbs that the callback's hooks call."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from ...adapters import Adapter
from ...decision import Average, Edit, MergePlan, Readings
from ...io.addresses import source_name
from ...live import Writer
from ...live.faults import Fault, attempt
from ...live.fingerprint import digest
from ...live.ranks import from_first
from ...record import Journal
from ...record.entries import check_entry
from ...record.log import Log
from ...record.metrics import check_metrics
from ...record.progress import Progress
from ...subspace import Subspace
from ..averaging import follow
from ..config.settings import SafeMergeConfig
from ..merging import Witness, merge
from ..trackers import Report, Trackers, decision_rows
from .artifact import Outcome, Section, run_section
from .background import Pending, begin, undisturbed
from .decide import Moment, agreed_plan, decided, still_disarmed
from .lines import broken_modules, merge_line
from .model_card import mark_card
from .schedule import due, final_due, interval
from .shares import Part, join, measure_own
from .state import Saved, save_run


@dataclass
class Session:
    """What one call of `trainer.train()` needs: made by `open_session`, after every check has passed."""

    config: SafeMergeConfig
    writer: Writer
    subspace: Subspace
    safety: Sequence[Adapter]
    journal: Journal
    progress: Progress
    log: Log
    trackers: Trackers
    optimizer: Any = None
    part: Part | None = None
    reference: Mapping[str, float] | None = None
    average: Average | None = None
    pending: Pending | None = None
    plan: MergePlan | None = None
    seal: tuple[int, str] | None = None
    left: str | None = None
    begun: float | None = field(default_factory=time.perf_counter)
    since: float | None = None
    witness: Witness | None = None
    left_out: float = 0.0
    unmerged: Mapping[str, str] = field(default_factory=dict)
    saved: Saved | None = None
    checkpoint: Saved | None = None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the wall clock of a hook, and let no gradient be recorded in it."""
        self.since = time.perf_counter()
        try:
            with torch.no_grad():
                yield
        finally:
            self.progress.seconds, self.since = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds spent in hooks since training began, the hook that runs now included."""
        return self.progress.seconds + (0.0 if self.since is None else time.perf_counter() - self.since)

    def leave_out(self, seconds: float) -> None:
        """Count `seconds` that have just passed neither as this callback's nor as training's."""
        self.left_out += seconds
        self.since = None if self.since is None else self.since + seconds
        self.begun = None if self.begun is None else self.begun + seconds

    @property
    def training_seconds(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.progress.training_seconds + (0.0 if self.begun is None else time.perf_counter() - self.begun)

    @property
    def share(self) -> float:
        """Share of the training time, from 0 to 1, that the hooks took."""
        return replace(self.progress, seconds=self.seconds, training_seconds=self.training_seconds).share

    def after_step(self, args: TrainingArguments, state: TrainerState, *, stopping: bool) -> None:
        """Apply what was measured beside this step; check if it is due, or the last: its checkpoint holds the merge."""
        config, step = self.config, state.global_step
        follow(self, step)
        last = stopping or step >= state.max_steps
        final = config.at_train_end and self.final_due(state, stopping=stopping)
        self.settle(args, state, hold="the final check at this step decides" if final else None)
        every = interval(config.every, state.max_steps)
        now = final or due(step, every=every, from_step=config.from_step, until_step=config.until_step)
        # Nothing follows the last step that a check could be measured beside.
        beside = now and config.asynchronous and not last and self.begin(step)
        if now and not beside:
            self.check(args, state, final=final)
        if last:
            self.seal_weights(step)

    def check(
        self, args: TrainingArguments, state: TrainerState, *, final: bool, at: int | None = None
    ) -> tuple[Edit, ...]:
        """Measure, decide, record, merge, record, report. `at` is the step the weights are from, if not this one."""
        began = time.perf_counter()
        own = attempt("measure", lambda: measure_own(self.writer.gather(), self.subspace, self.part, self.asked))
        return self.conclude(args, state, own, began, final=final, at=at)

    def begin(self, step: int) -> bool:
        """Start to measure the factors of `step` beside the next one; False where that would disturb the training."""
        if not from_first(undisturbed()):
            words = "training allows TF32 products, which a check beside it would forbid: checks are synchronous"
            self.log.warn("asynchronous", words)
            return False
        self.pending = begin(step, self.writer, self.subspace, self.part, self.asked)
        self.progress.pending = step
        return True

    def settle(self, args: TrainingArguments, state: TrainerState, *, hold: str | None = None) -> None:
        """Wait for the check that was begun, if one was, and conclude it; `hold` says why it must not merge."""
        if self.pending is None:
            return
        began, pending = time.perf_counter(), self.pending
        self.pending = self.progress.pending = None
        self.conclude(args, state, pending.result(), began, hold=hold, measured_at=pending.step)

    def conclude(
        self,
        args: TrainingArguments,
        state: TrainerState,
        own: Readings | Fault,
        began: float,
        *,
        final: bool = False,
        at: int | None = None,
        hold: str | None = None,
        measured_at: int | None = None,
    ) -> tuple[Edit, ...]:
        """Decide on this process's readings and the others', record, merge, record, report; `began` is a clock."""
        step = state.global_step
        self.progress.checks += 1
        self.progress.final_step = step if final else self.progress.final_step
        found, moment = join(own, self.part), Moment(step, step if at is None else at, state.max_steps)
        agreed = from_first(attempt("measure", lambda: decided(found, self.config, self.progress, moment, hold)))
        if isinstance(agreed, Fault):
            check_failed(self.log, step, agreed)
            return ()
        plan = agreed_plan(agreed, self.config, moment)
        self.progress.disarmed = still_disarmed(self.progress.disarmed, agreed.seen)
        seconds = time.perf_counter() - began
        self.log.tell(step, lambda: self.log.note(check_entry(step, plan, seconds, measured_at)))
        if words := broken_modules(step, plan):
            self.log.warn("broken", words)
        left_out = self.left_out
        edits = merge(self, step, plan, Path(args.output_dir) if final else None) if plan.selected else ()
        self.plan = plan
        took = time.perf_counter() - began - (self.left_out - left_out)
        self.log.tell(step, lambda: self._report(args, state, edits, took, final))
        return edits

    def _report(
        self, args: TrainingArguments, state: TrainerState, edits: Sequence[Edit], took: float, final: bool
    ) -> None:
        """Tell the terminal and the trackers what a check decided and a merge did, in `took` seconds."""
        step, plan = state.global_step, self.plan
        assert plan is not None, "nothing was decided"
        if edits:
            self.log.say(merge_line(step, plan, edits, self.progress))
        numbers = check_metrics(plan, edits, replace(self.progress, seconds=self.seconds), took)
        rows = decision_rows(step, plan, self.progress.task_weights)
        self.trackers.send(args, state, Report(step, numbers, rows, final))

    @property
    def asked(self) -> dict[str, Any]:
        """What `measure` needs of the gate."""
        return {"gate": self.config.gate_at(), "reference": self.reference}

    def save(self, state: TrainerState, folder: Path) -> None:
        """Let the checkpoint that the trainer is writing into `folder` hold the state, where this process writes."""
        if not self.log.first_rank:
            return
        with self.timed():
            done = attempt("state", lambda: save_run(self, state, folder))
            mark_card(folder, self.section())
        if isinstance(done, Fault):
            words = f"the state of {folder.name} could not be saved ({done.error}): a resume from it starts anew"
            self.log.warn("state", words)

    def section(self) -> Section | None:
        """What a model card says of the run by now; None where that cannot be told."""
        found = attempt("card", lambda: run_section(self.outcome()))
        if isinstance(found, Fault):
            self.log.warn("card", f"model cards do not say what was merged ({found.error})")
            return None
        return found

    def outcome(self, model: Any = None) -> Outcome:
        """What the run leaves behind, with the model where its adapter is to be saved."""
        adapters = ", ".join(map(source_name, self.config.adapters)) or None
        left = "; ".join(f"of {source}: {words}" for source, words in self.unmerged.items()) or None
        parts = {"subspace": source_name(self.config.subspace), "safety_adapter": adapters, "left_out": left}
        parts["settings"] = self.config.words or None
        return Outcome(self.journal.path, self.plan, self.progress, parts, model)

    def seal_weights(self, step: int) -> None:
        """Remember what the factors are at `step`, to see later whether they are still those."""
        found = from_first(self.digest()) if self.config.at_train_end else None
        self.seal = (step, found) if isinstance(found, str) else None

    def remember_epoch(self) -> None:
        """Remember what the factors are at an epoch's end, to see later whether the trainer put others there."""
        found = from_first(self.digest()) if self.config.at_train_end else None
        self.left = found if isinstance(found, str) else None

    def digest(self) -> str | Fault:
        """Return the fingerprint of all live factors."""
        return attempt("measure", lambda: digest(self.writer.gather()))

    def final_due(self, state: TrainerState, *, stopping: bool) -> bool:
        """Whether this step ends the run and still lacks its final check."""
        at, known = state.global_step, self.progress.final_step
        return final_due(at, max_steps=state.max_steps, stopping=stopping, final_step=known)


def check_failed(log: Log, step: int, fault: Fault) -> None:
    """Record that a check or a merge failed, and tell everybody of it."""
    message = f"{fault.where} failed at step {step}, nothing was merged, training goes on: {fault.error}"
    log.fault(step, fault, message, alert="a check failed")
