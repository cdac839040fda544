"""One training run under guard: the verbs that the callback's hooks call."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerState, TrainingArguments

from ..adapters import Adapter, Writer
from ..decision import Edit, Journal, MergePlan, Readings, Verdict, apply, check_entry, measure, merge_entry
from ..subspace import Subspace
from .config import SafeMergeConfig
from .metrics import check_metrics
from .progress import Progress
from .ranks import copy_from_first, from_first
from .schedule import cooling, due, final_due
from .seal import digest
from .trackers import Report, Row, Trackers, finite

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Fault:
    """What went wrong, where; it travels between processes in place of an answer."""

    where: str
    error: str


@dataclass
class Session:
    """What one call of `trainer.train()` needs: made by `open_session`, after every check has passed."""

    config: SafeMergeConfig
    writer: Writer
    subspace: Subspace
    safety: Adapter | None
    journal: Journal
    progress: Progress
    trackers: Trackers = field(default_factory=Trackers)
    seal: tuple[int, str] | None = None
    begun: float | None = field(default_factory=time.perf_counter)
    since: float | None = None
    warned: set[str] = field(default_factory=set)

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

    @property
    def training_seconds(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.progress.training_seconds + (0.0 if self.begun is None else time.perf_counter() - self.begun)

    @property
    def share(self) -> float:
        """Share of the training time, from 0 to 1, that the hooks took."""
        return min(self.seconds / max(self.training_seconds, 1e-9), 1.0)

    def after_step(self, args: TrainingArguments, state: TrainerState, *, stopping: bool) -> None:
        """Check if this step is due; the run's last step has its final check here, so that its checkpoint holds it."""
        config, step = self.config, state.global_step
        last = stopping or step >= state.max_steps
        final = config.at_train_end and self._final_due(state, stopping=stopping)
        if final or due(step, every=config.every, from_step=config.from_step, until_step=config.until_step):
            self.check(args, state, final=final)
        if last:
            self.seal_weights(step)

    def after_training(self, args: TrainingArguments, state: TrainerState) -> None:
        """Check once more if the final check has not happened, or the weights are not those it left (best reloaded)."""
        now = from_first(self._digest()) if self.config.at_train_end else None
        if isinstance(now, Fault):
            self._report_fault(state.global_step, now)
        elif now is not None:
            untouched = self.seal == (state.global_step, now)
            if not untouched or self._final_due(state, stopping=True):
                self.check(args, state, final=True, at=self._provenance(args, state, untouched))
        self.progress.training_seconds, self.begun = self.training_seconds, None
        self.note(_end_entry(state.global_step, self.progress, self.seconds))
        self.trackers.close()

    def check(self, args: TrainingArguments, state: TrainerState, *, final: bool, at: int | None = None) -> None:
        """Measure, decide, record, merge, record, report. `at` is the step the weights are from, if not this one."""
        began, step = time.perf_counter(), state.global_step
        self.progress.checks += 1
        self.progress.final_step = step if final else self.progress.final_step
        agreed = from_first(attempt("measure", lambda: self.decide(step if at is None else at)))
        if isinstance(agreed, Fault):
            return self._report_fault(step, agreed)
        plan = MergePlan(*agreed, **plan_knobs(self.config))
        self.note(check_entry(step, plan, time.perf_counter() - began))
        self._warn_of_broken_modules(step, plan)
        edits = self.merge(step, plan) if plan.selected else ()
        took = time.perf_counter() - began
        numbers = check_metrics(plan, edits, replace(self.progress, seconds=self.seconds), took)
        self.trackers.send(
            args, state, Report(step, numbers, _rows(step, plan), self.config.to_dict(), args.output_dir)
        )

    def decide(self, step: int) -> tuple[Readings, dict[str, Verdict]]:
        """Measure the live factors and ask the gate; where weights of `step` may not be merged, the reason says why."""
        plan = MergePlan.decide(measure(self.writer.gather(), self.subspace), **plan_knobs(self.config))
        pause = cooling(step, last_merge=self.progress.last_merge, cooldown=self.config.cooldown)
        return plan.readings, dict(plan.verdicts) if pause is None else held_back(plan.verdicts, pause)

    def merge(self, step: int, plan: MergePlan) -> tuple[Edit, ...]:
        """Apply `plan`; all ranks end with rank 0's factors. After a fault nothing is merged and training goes on."""
        began = time.perf_counter()
        edits = from_first(attempt("merge", lambda: apply(plan, self.writer, self.safety, self.subspace)))
        copy_from_first(self._tensors(plan.selected))
        if isinstance(edits, Fault):
            self._report_fault(step, edits)
            return ()
        share = self.config.weights[0] if "safety_adapter" in self.config.rule.needs else 1.0
        self.progress.record_merge(step, plan.selected, share)
        self.note(merge_entry(step, plan, edits, self.progress.task_weights, time.perf_counter() - began))
        return edits

    def save(self, folder: Path) -> None:
        """Put the progress beside the weights of a checkpoint, where this process writes and the folder exists."""
        if not self.journal.enabled or not folder.is_dir():
            return
        try:
            replace(self.progress, seconds=self.seconds, training_seconds=self.training_seconds).save(folder)
        except OSError as error:
            self.warn(
                "state",
                f"the state of {folder.name} could not be saved ({error}): a resume from it starts counting anew",
            )

    def seal_weights(self, step: int) -> None:
        """Remember what the factors are at `step`, to see later whether they are still those."""
        found = from_first(self._digest()) if self.config.at_train_end else None
        self.seal = (step, found) if isinstance(found, str) else None

    def note(self, entry: Mapping[str, Any]) -> None:
        """Append to the journal; a journal that fails is reported once and never stops training."""
        try:
            self.journal.append(entry)
            self.progress.journal_entries += 1
        except OSError as error:
            self.warn("journal", f"the journal lacks entries from step {entry.get('step')} on ({error}): free the disk")

    def warn(self, kind: str, message: str) -> None:
        """Warn once a run for each `kind`."""
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(f"safemerge: {message}", stacklevel=3)

    def _digest(self) -> str | Fault:
        return attempt("measure", lambda: digest(self.writer.gather()))

    def _tensors(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        factors = self.writer.gather()
        for name in names:
            yield from (factors[name].A, factors[name].B)

    def _final_due(self, state: TrainerState, *, stopping: bool) -> bool:
        final_step = self.progress.final_step
        return final_due(state.global_step, max_steps=state.max_steps, stopping=stopping, final_step=final_step)

    def _provenance(self, args: TrainingArguments, state: TrainerState, untouched: bool) -> int:
        """The step that the present weights are from; where they were reloaded, their merges are taken over too."""
        best = state.best_model_checkpoint
        reloaded = args.load_best_model_at_end and best is not None
        if untouched or not (reloaded or self._sealed_at(state.global_step)):
            return state.global_step
        history = Progress.load(Path(best)) if reloaded else None
        self.progress.rewind(from_first(history))
        return state.best_global_step if reloaded and state.best_global_step is not None else state.global_step

    def _sealed_at(self, step: int) -> bool:
        return self.seal is not None and self.seal[0] == step

    def _report_fault(self, step: int, fault: Fault) -> None:
        self.note({"kind": "error", "step": step, "where": fault.where, "error": fault.error})
        self.warn(
            fault.where, f"{fault.where} failed at step {step}, nothing was merged, training goes on: {fault.error}"
        )

    def _warn_of_broken_modules(self, step: int, plan: MergePlan) -> None:
        broken = [name for name, reading in plan.readings.items() if not reading.finite]
        if broken:
            self.warn(
                "broken",
                f"{len(broken)} modules hold NaN or infinite updates at step {step} and are not merged, first "
                f"{broken[0]!r}: lower the learning rate or resume from an earlier checkpoint",
            )


def attempt(where: str, action: Callable[[], Answer]) -> Answer | Fault:
    """Return what `action` does, or the fault: whatever goes wrong in here must not cost the user the training."""
    try:
        return action()
    except Exception as error:
        return Fault(where, f"{type(error).__name__}: {error}")


def plan_knobs(config: SafeMergeConfig) -> dict[str, Any]:
    """The settings that a `MergePlan` is made with."""
    return {name: getattr(config, name) for name in ("gate", "threshold", "num_layers", "method", "space", "weights")}


def held_back(verdicts: Mapping[str, Verdict], pause: str) -> dict[str, Verdict]:
    """Return the verdicts with every merge held back, the reason saying so."""
    return {name: Verdict(False, f"{v.reason}; {pause}") if v.merge else v for name, v in verdicts.items()}


def _rows(step: int, plan: MergePlan) -> list[Row]:
    verdicts = plan.verdicts
    return [
        (step, n, finite(r.cosine), finite(r.null_cosine), finite(r.update_norm), verdicts[n].merge, verdicts[n].reason)
        for n, r in plan.readings.items()
    ]


def _end_entry(step: int, progress: Progress, seconds: float) -> dict[str, Any]:
    return {
        "kind": "end",
        "step": step,
        "checks": progress.checks,
        "merges": progress.merges,
        "modules_merged": progress.modules_merged,
        "seconds": seconds,
        "training_seconds": progress.training_seconds,
    }
