"""Send a check's numbers to whatever the trainer already reports to, and to nothing else.

Every tracker has one signature and looks for itself whether a live run is there. None is imported before the trainer
has: `args.report_to` decides. A tracker that fails is reported once; training goes on.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerState, TrainingArguments

COLUMNS = ("step", "module", "cosine", "null_cosine", "update_norm", "merged", "reason")
Row = tuple[int, str, float | None, float | None, float | None, bool, str]


@dataclass(frozen=True)
class Report:
    """One check: metrics as in `METRICS`, a row of `COLUMNS` a module, the settings, the trainer's folder."""

    step: int
    metrics: Mapping[str, float]
    rows: Sequence[Row]
    settings: Mapping[str, Any]
    output_dir: str


Tracker = Callable[[Report, dict[str, Any]], None]


@dataclass
class Trackers:
    """The trackers of one training run: what they keep open between checks, and which have failed."""

    kept: dict[str, Any] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def send(self, args: TrainingArguments, state: TrainerState, report: Report) -> None:
        """Append the numbers to `state.log_history`, so to trainer_state.json; on the first process, send them."""
        state.log_history.append({**report.metrics, "step": report.step, "epoch": state.epoch})
        if not state.is_world_process_zero:
            return
        for name, track in TRACKERS.items():
            if name in args.report_to and name not in self.failed:
                self._send_to(name, track, report)

    def numbers(self, args: TrainingArguments, state: TrainerState, metrics: Mapping[str, float]) -> None:
        """Send numbers alone, as `send`, under the optimizer step."""
        self.send(args, state, Report(state.global_step, metrics, (), {}, args.output_dir))

    def log_adapter(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Log `model`'s adapter as a new version of the W&B artifact that the trainer has logged it as."""
        if not state.is_world_process_zero or "wandb" not in args.report_to or "wandb" in self.failed:
            return
        try:
            _adapter_to_wandb(args, model, state.global_step)
        except Exception as error:
            self._give_up("wandb", state.global_step, error)

    def close(self) -> None:
        """Give back what the trackers opened themselves."""
        writer = self.kept.pop("tensorboard", None)
        if writer is not None:
            writer.close()

    def _send_to(self, name: str, track: Tracker, report: Report) -> None:
        # whatever a tracker raises, a network fault or a full disk, is no reason to lose the training
        try:
            track(report, self.kept)
        except Exception as error:
            self._give_up(name, report.step, error)

    def _give_up(self, name: str, step: int, error: Exception) -> None:
        self.failed.add(name)
        warnings.warn(
            f"safemerge: tracker {name!r} failed at step {step} ({type(error).__name__}: {error}) and gets "
            "no more numbers; the journal and trainer_state.json still do",
            stacklevel=3,
        )


def to_wandb(report: Report, kept: dict[str, Any]) -> None:
    """Log to the live W&B run, on the axis train/global_step; decisions as one incremental table."""
    import wandb

    if wandb.run is None:
        return
    if kept.get("wandb") is not wandb.run:
        kept["wandb"] = wandb.run
        kept["wandb_table"] = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        wandb.define_metric("safemerge/*", step_metric="train/global_step")
        if report.settings:
            wandb.config.update({"safemerge": dict(report.settings)}, allow_val_change=True)
    for row in report.rows:
        kept["wandb_table"].add_data(*row)
    # `step=` would fight with the trainer's own logging: W&B drops what comes with an older step
    wandb.log({"train/global_step": report.step, **report.metrics, "safemerge/decisions": kept["wandb_table"]})


def _adapter_to_wandb(args: TrainingArguments, model: Any, step: int) -> None:
    """Upload the adapter as the next version of the trainer's own artifact, whose name holds the run's name or id."""
    import wandb

    if wandb.run is None:
        return
    unnamed = args.run_name is None or args.run_name == args.output_dir
    name = f"model-{wandb.run.id if unnamed else wandb.run.name}"
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        artifact = wandb.Artifact(name, type="model", metadata={"safemerge/step": step})
        artifact.add_dir(folder)
        wandb.run.log_artifact(artifact, aliases=["final_model", "safemerge"])


def to_tensorboard(report: Report, kept: dict[str, Any]) -> None:
    """Write an event file of our own, in the folder `safemerge` beneath the trainer's run.

    Its own folder, because a reader may give up the older of two event files that grow in one.
    """
    if "tensorboard" not in kept:
        from torch.utils.tensorboard import SummaryWriter

        kept["tensorboard"] = SummaryWriter(log_dir=str(_tensorboard_run(Path(report.output_dir)) / "safemerge"))
    for key, value in report.metrics.items():
        kept["tensorboard"].add_scalar(key, value, report.step)
    kept["tensorboard"].flush()


def to_mlflow(report: Report, _kept: dict[str, Any]) -> None:
    """Log to the active MLflow run, under the optimizer step."""
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.log_metrics(dict(report.metrics), step=report.step)


def to_trackio(report: Report, _kept: dict[str, Any]) -> None:
    """Log to the live trackio run; the trainer ends it before our last hook, whose merge the journal alone tells."""
    import trackio

    if trackio.context_vars.current_run.get() is not None:
        trackio.log({"train/global_step": report.step, **report.metrics})


TRACKERS: dict[str, Tracker] = {
    "wandb": to_wandb,
    "tensorboard": to_tensorboard,
    "mlflow": to_mlflow,
    "trackio": to_trackio,
}


def _tensorboard_run(output_dir: Path) -> Path:
    """The folder of the trainer's own event file, known by the process id in its name."""
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if chosen:
        return Path(chosen).expanduser()
    runs = output_dir / "runs"
    ours = [p for p in runs.rglob(f"events.out.tfevents.*.{os.getpid()}.*") if p.parent.name != "safemerge"]
    return max(ours, key=lambda p: p.stat().st_mtime).parent if ours else runs


def finite(value: float) -> float | None:
    """Return `value`, or None where it is NaN or infinite: tables and JSON hold no such number."""
    return value if math.isfinite(value) else None
