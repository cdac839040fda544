"""Log a loop of your own, without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..decision import Edit, MergePlan
from ..io.paths import as_path
from ..record import JOURNAL_FILE, Journal, check_entry, merge_entry
from ..record.log import Log
from ..record.metrics import check_metrics
from ..record.progress import Progress
from .run.artifact import Outcome
from .run.lines import nothing_merged
from .trackers import Report, Run, Trackers, decision_rows, known


class LoopLog:
    """Journal and trackers for a loop without a Trainer; a context manager that closes what it opened.

    report_to: any of wandb, tensorboard, mlflow, trackio; ConfigError for another name. You start the runs before and
    end them after it, except TensorBoard's event file, which is written to `folder`/runs/safemerge. `journal` is a
    path, by default safemerge.jsonl in `folder`. `settings` are shown beside the run. With `enabled=False` (every rank
    but the first) it counts and writes nothing. A tracker or a journal that fails is told of once; the loop goes on.
    """

    def __init__(
        self,
        folder: str | Path,
        report_to: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        journal: str | Path | None = None,
        enabled: bool = True,
    ) -> None:
        self.names = known([report_to] if isinstance(report_to, str) else report_to) if enabled else []
        self.folder, self.step = as_path(folder, "folder"), 0
        self.plan: MergePlan | None = None
        self.journal = Journal(journal or self.folder / JOURNAL_FILE, enabled=enabled)
        self.progress = Progress()
        self.log = Log(quiet=True, journal=self.journal, progress=self.progress)
        self.trackers = Trackers(self.log)
        self.trackers.attach(self.names, Run(self.folder, settings or {}))

    def check(
        self, step: int, plan: MergePlan, edits: Sequence[Edit] = (), *, seconds: float = 0.0, final: bool = False
    ) -> None:
        """Record one check: what was decided at optimizer step `step`, what `apply` returned, how long both took."""
        self.plan, self.step = plan, step
        self.progress.checks += 1
        self.progress.seconds += seconds
        self.log.note(check_entry(step, plan, seconds))
        if edits:
            self.progress.record_merge(step, {edit.name: plan.task_weight_of(edit.name) for edit in edits})
            self.log.note(merge_entry(step, plan, edits, self.progress.task_weights, seconds))
        numbers = check_metrics(plan, edits, self.progress, seconds)
        self.trackers.check(
            self.names, Report(step, numbers, decision_rows(step, plan, self.progress.task_weights), final)
        )

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send scalars of your own under the optimizer step."""
        self.trackers.scalars(self.names, step, metrics)

    def finish(self, model: Any = None) -> None:
        """Hand journal, last plan, card and, with `model` (a PeftModel), its adapter to W&B and MLflow.

        Warns where the loop has checked and no check merged, though its gate is not `watch`.
        """
        if self.plan and self.plan.gate.merges and not self.progress.merges:
            self.log.warn("nothing merged", nothing_merged(self.progress, self.plan))
        self.trackers.finish(self.step, Outcome(self.journal.path, self.plan, self.progress, {}, model).write)

    def __enter__(self) -> LoopLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.trackers.close()
