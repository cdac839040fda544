"""All trackers of a run: sent to alike, guarded alike, and told of once when they fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from ...decision import BAND
from ...io.choices import one_of
from ...live.faults import Fault
from ...record.log import Log
from .columns import Drift
from .protocol import Report, Run, Tracker

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

# Name as in `report_to` -> the module of this folder and its class; a module is loaded when its tracker is asked for.
TRACKERS = {
    "wandb": ("wandb", "WandbTracker"),
    "tensorboard": ("tensorboard", "TensorBoardTracker"),
    "mlflow": ("mlflow", "MlflowTracker"),
    "trackio": ("trackio", "TrackioTracker"),
}


@dataclass
class Trackers:
    """The trackers of one run: those open, and which part of which has failed.

    `log` takes what the terminal is told, and what failed. `run` is set by `open`, or by the first that is sent.
    """

    log: Log = field(default_factory=Log)
    run: Run | None = None
    opened: dict[str, Tracker] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)
    drift: Drift = field(default_factory=Drift)
    alert_topics: set[str] = field(default_factory=set)
    last: int = 0

    def open(self, args: TrainingArguments, state: TrainerState, settings: Mapping[str, Any]) -> None:
        """Attach to what the trainer reports to, and show the settings there."""
        self.attach(_names(args, state), Run(Path(args.output_dir), settings), state.global_step)

    def send(self, args: TrainingArguments, state: TrainerState, report: Report) -> None:
        """Append the numbers to `state.log_history`, so to trainer_state.json; on the first process, send the check."""
        state.log_history.append({**report.metrics, "step": report.step, "epoch": state.epoch})
        self._know(args)
        self.check(_names(args, state), report)

    def numbers(self, args: TrainingArguments, state: TrainerState, metrics: Mapping[str, float]) -> None:
        """Append scalars to `state.log_history`; on the first process, send them under the present optimizer step."""
        state.log_history.append({**metrics, "step": state.global_step, "epoch": state.epoch})
        self._know(args)
        self.scalars(_names(args, state), state.global_step, metrics)

    def log_adapter(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Log `model`'s adapter as a new version of the W&B artifact that the trainer has logged it as."""
        names = [name for name in _names(args, state) if name == "wandb"]
        run_name = args.run_name if args.run_name != args.output_dir else None
        step = state.global_step
        self._know(args)
        self._each(names, step, "files", lambda tracker: cast(Any, tracker).adapter(model, run_name, step))

    def attach(self, names: Sequence[str], run: Run, step: int = 0) -> None:
        """Attach to the live runs of the trackers of these names."""
        self.run = run
        self._each(names, step, "numbers", lambda tracker: None)  # noqa: ARG005 - to open it is all

    def check(self, names: Sequence[str], report: Report) -> None:
        """Send one check to the trackers of these names; the picture of all checks at 1, 2, 4, 8 ... and the last."""
        self.drift.add(report.rows)
        self._each(names, report.step, "numbers", lambda tracker: tracker.check(report))
        if report.rows and (self.drift.due or report.final):
            self._picture(names, report.step)
        self._warn_of_moved(report)
        below = [row.module for row in report.rows if row.below]
        if below:
            text = f"{len(below)} of {len(report.rows)} modules at step {report.step}, first {below[0]!r}"
            self.alert(report.step, "below", "safemerge: a module fell below the gate", text)

    def _warn_of_moved(self, report: Report) -> None:
        """Tell a person of a run as far back along V as those that lost their refusals; anew once it has recovered."""
        moved = report.metrics.get("safemerge/moved_mean")
        if moved is not None and moved < BAND.edge:
            text = f"moved_mean is {moved:.2f} at step {report.step}, {BAND.words(moved)}: ask the model (a probe)"
            self.alert(report.step, "moved", "safemerge: the run goes back along the alignment", text)
        elif moved is not None and moved >= BAND.rearm:
            self.alert_topics.discard("moved")

    def scalars(self, names: Sequence[str], step: int, metrics: Mapping[str, float]) -> None:
        """Send scalars to the trackers of these names."""
        self._each(names, step, "numbers", lambda tracker: tracker.numbers(step, metrics))

    def alert(self, step: int, about: str, title: str, text: str, *, said: bool = False) -> None:
        """Tell a person through every open tracker that can, and in the terminal; once for each `about`,
        until it is told anew.

        `said`: whether the terminal has it already.
        """
        if about not in self.alert_topics:
            self.alert_topics.add(about)
            if not said:
                self.log.say(f"step {step:,}: {title.removeprefix('safemerge: ')}: {text}")
            self._each(list(self.opened), step, "alerts", lambda tracker: tracker.alert(step, title, text))

    def finish(self, step: int, fill: Callable[[Path], None]) -> None:
        """Send the last picture if a check came after it, and the run's files; `fill` writes them into a folder."""
        if self.drift.checks and not self.drift.shown:
            self._picture(list(self.opened), step)
        takers = [name for name, tracker in self.opened.items() if tracker.takes_files]
        if not takers:
            return
        try:
            with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                fill(Path(folder))
                self._each(takers, step, "files", lambda tracker: tracker.files(step, Path(folder)))
        # a disk without room for a copy of the adapter
        except Exception as error:
            for name in takers:
                self._give_up(name, "files", step, error)

    def close(self) -> None:
        """Give back what the trackers opened themselves."""
        self._each(list(self.opened), self.last, "numbers", lambda tracker: tracker.close())
        self.opened.clear()

    def _picture(self, names: Sequence[str], step: int) -> None:
        self._each(names, step, "pictures", lambda tracker: tracker.heat_map(step, self.drift))
        self.drift.shown = True

    def _know(self, args: TrainingArguments) -> None:
        self.run = self.run or Run(Path(args.output_dir), {})

    def _each(self, names: Sequence[str], step: int, part: str, action: Callable[[Tracker], None]) -> None:
        for name in names:
            if self.failed.isdisjoint({(name, part), (name, "numbers")}):
                # whatever a tracker raises, a network fault or a full disk, is no reason to lose the training
                try:
                    self.last = step
                    action(self._open(name))
                except Exception as error:
                    self._give_up(name, part, step, error)

    def _open(self, name: str) -> Tracker:
        if name not in self.opened:
            file, kind = TRACKERS[name]
            module = import_module(f"{__package__}.{file}")
            self.opened[name] = getattr(module, kind)(self.run)
        return self.opened[name]

    def _give_up(self, name: str, part: str, step: int, error: Exception) -> None:
        self.failed.add((name, part))
        words = f"{type(error).__name__}: {error}"
        message = (
            f"tracker {name!r} failed at step {step} ({words}) and gets no more {part}; the journal and "
            "trainer_state.json still have every number"
        )
        fault = Fault(f"tracker {name}", f"no more {part}: {words}")
        self.log.fault(step, fault, message, kind=f"tracker {name}, {part}")


def _names(args: TrainingArguments, state: TrainerState) -> list[str]:
    """What the trainer reports to and we know; nothing on any process but the first."""
    return [name for name in TRACKERS if name in args.report_to] if state.is_world_process_zero else []


def known(names: Sequence[str]) -> list[str]:
    """Return `names`; ConfigError for one that is no tracker of ours."""
    return [one_of(name, sorted(TRACKERS), "tracker") for name in names]
