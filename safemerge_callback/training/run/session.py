"""One training run under guard: the verbs that the callback's hooks call."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn
from transformers import TrainerState, TrainingArguments

from ...corrections.change import ChangeEngine, Witness, report_failure
from ...corrections.gradient import GradientEngine
from ...corrections.merge import Merge
from ...corrections.protocol import Batchwise, Correction, GradientTerm, PassSeries, RunPoint, Term
from ...corrections.schedule import final_due
from ...decision import Edit, MergePlan, Readings
from ...errors import ConfigError
from ...live import Writer
from ...live.faults import Fault, attempt
from ...live.micro_batch import MicroBatch
from ...live.ranks import from_first, many
from ...record.entries import check_entry, end_entry
from ...record.log import Log
from ...record.metrics import check_metrics
from ...record.progress import Progress
from ...subspace import Subspace
from ..config.settings import SafeMergeConfig
from ..trackers import Report, Trackers, decision_rows
from .artifact import Outcome, Section, outcome_of, run_section
from .background import Pending, begin, undisturbed
from .check_data import Answer, RunData, ask, with_signals
from .clock import Clock, logged_at
from .decide import CheckMoment, agreed_plan, decided, still_disarmed
from .ending import (
    Marks,
    engine_keeps_weights,
    is_reloaded,
    log_model_again,
    loss_of,
    note_best,
    rewrite_adapter,
)
from .guarded import GuardedRun
from .lines import alike_inputs, broken_modules, closing_line, merge_line, nothing_merged, unused_inputs
from .model_card import mark_card, mark_model
from .shares import RankShare, join, measure_once
from .state import Saved, kept_of, past_of, save_run, save_run_again


@dataclass
class Session:
    """What one call of `trainer.train()` needs: made by `open_session`, after every check has passed.

    It hands out its parts and is handed to nobody.
    """

    config: SafeMergeConfig
    args: TrainingArguments
    state: TrainerState
    start: RunPoint
    merge: Merge
    log: Log
    trackers: Trackers
    clock: Clock
    share: RankShare | None = None
    reference: Mapping[str, float] | None = None
    unmerged: Mapping[str, str] = field(default_factory=dict)
    corrections: Sequence[Correction | Term | Batchwise] = ()
    batch: MicroBatch | None = None
    data: RunData = field(default_factory=RunData)
    pending: Pending | None = None
    plan: MergePlan | None = None
    saved: Saved | None = None
    checkpoint: Saved | None = None

    def __post_init__(self) -> None:
        writer = self.start.writer
        self.engine = ChangeEngine(writer, self.start.optimizer, self.config.optimizer_state, self.log)
        self.marks = Marks(writer, self.config.measures and self.config.at_train_end)
        self.kept = kept_of(self.merge, self.corrections, self.data)
        self.changes = [one for one in self.corrections if isinstance(one, Correction)]
        terms = [one for one in self.corrections if isinstance(one, GradientTerm | PassSeries)]
        others = [one for one in self.corrections if isinstance(one, Batchwise)]
        self.gradients = GradientEngine(terms, self.batch, self.log, others)

    @property
    def progress(self) -> Progress:
        """The counts of the run."""
        return self.log.progress

    @property
    def writer(self) -> Writer:
        """Who reads and writes the live factors."""
        return self.start.writer

    @property
    def subspace(self) -> Subspace:
        """What checks measure with; only a run that has one checks."""
        assert self.start.subspace is not None, "a check needs a subspace"
        return self.start.subspace

    @property
    def journal(self) -> Path:
        """Where the journal is."""
        assert self.log.journal is not None, "a run has a journal"
        return self.log.journal.path

    @property
    def step(self) -> int:
        """The optimizer steps done."""
        return self.state.global_step

    @property
    def point(self) -> RunPoint:
        """Where the run stands now, as a correction sees it."""
        return replace(self.start, step=self.step)

    def after_step(self, *, stopping: bool) -> None:
        """Apply what was measured beside this step; check if it is due, or the last: its checkpoint holds the merge."""
        config, step = self.config, self.step
        self.gradients.after_update(self.point)
        self._follow()
        last = stopping or step >= self.state.max_steps
        for one in self.changes:
            if one.schedule.due(step, self.state.max_steps, last=last):
                self.engine.make(one, self.point)
        if config.measures:
            self._check_where_due(stopping=stopping, last=last)
        if last:
            self.marks.seal(step)

    def _check_where_due(self, *, stopping: bool, last: bool) -> None:
        """Conclude the check that was begun beside this step, and check where the schedule or the run's end says so."""
        final = self.config.at_train_end and self.final_due(stopping=stopping)
        self.settle(hold="the final check at this step decides" if final else None)
        now = final or self.merge.schedule.due(self.step, self.state.max_steps)
        # Nothing follows the last step that a check could be measured beside.
        beside = now and self.config.asynchronous and not last and self.begin()
        if now and not beside:
            self.check(final=final)

    def before_step(self) -> None:
        """Add the gradients that are due to the step that begins; measure them where it will be logged."""
        with self.data.unseen():
            self.gradients.before_step(self.point, measured=logged_at(self.step + 1, self.args, self.state))

    def before_update(self) -> None:
        """Let gradients that were kept apart join the step's, which are whole now."""
        self.gradients.before_update(self.step + 1)

    def tell_terms(self, norm: float | None = None) -> None:
        """Tell what the gradient terms came to; `norm`: of the step's whole gradient, before it was clipped."""
        numbers = self.gradients.report(self.step, norm)
        if numbers:
            self.log.tell(self.step, lambda: self.trackers.numbers(self.args, self.state, numbers))

    def _follow(self) -> None:
        """Let what is kept of the run follow this step."""
        for kept in self.kept:
            done = attempt(kept.name, partial(kept.after_step, self.point))
            if isinstance(done, Fault):
                words = f"the {kept.noun} lacks step {self.step}, training goes on: {done.error}"
                self.log.fault(self.step, done, words)

    def check(self, *, final: bool, weights_of: int | None = None) -> tuple[Edit, ...]:
        """Measure, decide, record, merge, record, report. `weights_of`: the step the weights are from, if another."""
        began = time.perf_counter()
        readings = attempt("measure", lambda: measure_once(self.writer.gather(), self.subspace, self.share, self.gate))
        return self.conclude(readings, self._moment(began, weights_of, final=final))

    def begin(self) -> bool:
        """Start to measure the factors of this step beside the next; False where that would disturb the training."""
        if not from_first(undisturbed()):
            words = "training allows TF32 products, which a check beside it would forbid: checks are synchronous"
            self.log.warn("asynchronous", words)
            return False
        self.pending = begin(self.step, self.writer, self.subspace, self.share, self.gate)
        self.progress.pending = self.step
        return True

    def begin_again(self) -> None:
        """Measure once more what a checkpoint's run was measuring at this step, beside the next one if it may be.

        The checkpoint holds the weights that were being measured: the same readings come again.
        """
        pending, self.progress.pending = self.progress.pending, None
        if pending == self.step:
            with self.clock.hook():
                if not self.begin():
                    self.check(final=False)

    def settle(self, *, hold: str | None = None) -> None:
        """Wait for the check that was begun, if one was, and conclude it; `hold` says why it must not merge."""
        if self.pending is None:
            return
        began, pending = time.perf_counter(), self.pending
        self.pending = self.progress.pending = None
        self.conclude(pending.result(), self._moment(began, hold=hold, measured_at=pending.step))

    def _moment(self, began: float, weights_of: int | None = None, **about: Any) -> CheckMoment:
        step = self.step
        return CheckMoment(step, step if weights_of is None else weights_of, self.state.max_steps, began, **about)

    def conclude(self, readings: Readings | Fault, moment: CheckMoment) -> tuple[Edit, ...]:
        """Decide on this process's readings and the others', record, merge, record, report."""
        step, final = moment.step, moment.final
        self.progress.checks += 1
        self.progress.final_step = step if final else self.progress.final_step
        answer = attempt("signals", lambda: ask(self.data, self.point))
        readings = with_signals(join(readings, self.share), answer)
        agreed = from_first(attempt("measure", lambda: decided(readings, self.config, self.progress, moment)))
        if isinstance(agreed, Fault):
            report_failure(self.log, step, agreed)
            return ()
        plan = agreed_plan(agreed, self.config, moment)
        self.progress.disarmed = still_disarmed(self.progress.disarmed, agreed.seen)
        took = time.perf_counter() - moment.began
        self.log.tell(step, lambda: self.log.note(check_entry(step, plan, took, moment.measured_at)))
        if words := broken_modules(step, plan):
            self.log.warn("broken", words)
        for kind, words in (("inputs", alike_inputs(step, plan)), ("unused", unused_inputs(step, plan))):
            if words:
                self.log.warn(kind, words)
        left_out = self.clock.left_out
        data = answer.data if isinstance(answer, Answer) else None
        at, keep_in = replace(self.point, plan=plan, data=data), Path(self.args.output_dir) if final else None
        edits = self.engine.make(self.merge, at, keep_in) if plan.selected else ()
        self.plan = plan
        seconds = time.perf_counter() - moment.began - (self.clock.left_out - left_out)
        self.log.tell(step, lambda: self._report(plan, edits, seconds, final))
        return edits

    def _report(self, plan: MergePlan, edits: Sequence[Edit], seconds: float, final: bool) -> None:
        """Tell the terminal and the trackers what a check decided and a merge did, in so many seconds."""
        step = self.step
        if edits:
            self.log.say(merge_line(step, plan, edits, self.progress))
        numbers = check_metrics(plan, edits, replace(self.progress, seconds=self.clock.seconds), seconds)
        rows = decision_rows(step, plan, self.progress.task_weights)
        self.trackers.send(self.args, self.state, Report(step, numbers, rows, final))

    @property
    def gate(self) -> dict[str, Any]:
        """What `measure` needs of the gate."""
        return {"gate": self.config.gate_at(), "reference": self.reference}

    def final_due(self, *, stopping: bool) -> bool:
        """Whether this step ends the run and still lacks its final check."""
        final_step = self.progress.final_step
        return final_due(self.step, max_steps=self.state.max_steps, stopping=stopping, final_step=final_step)

    def guarded(self) -> GuardedRun:
        """Return what a probe of this run works with."""
        config = self.config
        able = config.measures, config.merges, config.merges or bool(self.changes)
        return GuardedRun(*able, self.log, self.trackers, self.clock, self._watch, self._check_now)

    def _watch(self, witness: Witness) -> None:
        if self.engine.witness is not None:
            raise ConfigError("this trainer has two SafetyEvalCallbacks: keep one, and give it all prompts")
        self.engine.witness = witness

    def _check_now(self, hold: str) -> None:
        with self.clock.hook():
            self.settle(hold=hold)
            self.check(final=False)
            if self.marks.sealed_at(self.step):
                self.marks.seal(self.step)

    def save(self, folder: Path) -> None:
        """Let the checkpoint that the trainer is writing into `folder` hold the state, where this process writes."""
        if not self.log.first_rank:
            return
        with self.clock.hook():
            # Another callback may have asked for it after our hook of the step. Many ranks would have to tell together.
            if self.gradients.untold and not many():
                self.tell_terms()
            saved = self.saved = Saved(self.step, folder, uuid4().hex)
            initial = self.writer.initial
            done = attempt("state", lambda: save_run(self.state, saved, self.clock.now, initial, self.kept))
            mark_card(folder, self.section())
        if isinstance(done, Fault):
            words = f"the state of {folder.name} could not be saved ({done.error}): a resume from it starts anew"
            self.log.warn("state", words)

    def section(self) -> Section | None:
        """What a model card says of the run by now; None where that cannot be told."""
        section = attempt("card", lambda: run_section(self.outcome()))
        if isinstance(section, Fault):
            self.log.warn("card", f"model cards do not say what was done ({section.error})")
            return None
        return section

    def outcome(self, model: Any = None) -> Outcome:
        """What the run leaves behind, with the model where its adapter is to be saved."""
        subspace = self.point.subspace.name if self.point.subspace is not None else None
        return outcome_of(self.config, self.journal, self.plan, self.progress, self.unmerged, model, subspace)

    def end(self, model: nn.Module | None, batches: Iterable[Any] | None) -> None:
        """Check once more if the final check has not happened, or the weights are not those it left; close the records.

        The weights differ where the trainer reloaded the best checkpoint, or something stopped the run after our last
        hook.
        """
        self.settle(hold="training ended before this check could be applied")
        self.tell_terms()
        self._check_what_is_left(model, batches)
        if self.engine.witness:
            self.engine.witness.closing()
        self.clock.stop()
        self.log.note(end_entry(self.step, self.progress, self.clock.seconds, self.progress.training_seconds))
        self.log.tell(self.step, self._say_the_end)
        # No adapter where it is sharded: all ranks would have to save it together.
        self.trackers.finish(self.step, self.outcome(None if self.writer.sharded else model).write)
        self.trackers.close()
        if self.progress.merges or self.progress.correction_steps:
            mark_model(model)
        if self.log.first_rank:
            mark_card(Path(self.args.output_dir), self.section(), begin=True, model=model)

    def _check_what_is_left(self, model: nn.Module | None, batches: Iterable[Any] | None) -> None:
        now = self.marks.now()
        if isinstance(now, Fault):
            report_failure(self.log, self.step, now)
        elif now is not None:
            untouched = self.marks.sealed == (self.step, now)
            if not untouched or self.final_due(stopping=True):
                reloaded = not untouched and is_reloaded(self.args, self.state, self.marks.epoch, now)
                self._last_check(model, batches, untouched=untouched, reloaded=reloaded)

    def _last_check(
        self, model: nn.Module | None, batches: Iterable[Any] | None, *, untouched: bool, reloaded: bool
    ) -> None:
        weights_of = self.step if untouched else self._provenance(reloaded)
        compare = reloaded and self.config.merges and model is not None and batches is not None
        before = loss_of(model, batches) if compare else None
        edits = self.check(final=True, weights_of=weights_of)
        if not edits:
            return
        if isinstance(before, float):
            losses = before, loss_of(model, batches)
            self.log.tell(self.step, lambda: note_best(self.log, self.trackers, self.args, self.state, losses))
        if not reloaded:
            self._save_again()
        # A sharded adapter is saved by all ranks together, and this runs on the first alone.
        if model is not None and not self.writer.sharded:
            log_model_again(self.trackers, self.args, self.state, model)

    def _provenance(self, reloaded: bool) -> int:
        """The step that weights which are not those we left are from; where reloaded, their merges are taken over."""
        if not reloaded and not self.marks.sealed_at(self.step):
            return self.step
        past = past_of(Path(str(self.state.best_model_checkpoint))) if reloaded else None
        history = from_first(past.progress if past else None)
        self.progress.rewind(history)
        if past:
            if history is None and self.progress.merges:
                words = f"the best checkpoint {past.reason}: what was merged into it before is not known"
                self.log.warn("best", words)
            for kept in self.kept:
                kept.rewind(past.folders, past.save)
        best = self.state.best_global_step
        return best if reloaded and best is not None else self.step

    def _save_again(self) -> None:
        """Put the merged factors into the checkpoint of this step, which was written before this merge.

        Left alone where an engine keeps its own copy of the weights there, which a resume would read instead.
        """
        factors, checkpoint = self.writer.gather(), self.checkpoint
        if checkpoint is None or checkpoint.step != self.step or not checkpoint.folder.is_dir():
            return
        folder = checkpoint.folder
        if engine_keeps_weights(folder):
            return
        try:
            rewrite_adapter(folder, self.writer.adapter_name, factors)
            save_run_again(checkpoint, self.clock.now)
            mark_card(folder, self.section())
        except (OSError, ValueError, KeyError) as error:
            self.log.warn("checkpoint", f"{folder.name} holds the weights before the final merge ({error})")

    def _say_the_end(self) -> None:
        """A run that could have merged and did not is warned of, before the line that ends every run.

        Where a check or a merge failed, that was warned of already.
        """
        if self.config.merges and not self.progress.merges and not self.log.warned & {"measure", self.merge.name}:
            self.log.warn("nothing merged", nothing_merged(self.progress, self.plan))
        took = self.clock.seconds, self.clock.now.share
        self.log.say(closing_line(self.config, self.progress, *took, self.journal, self.plan))
