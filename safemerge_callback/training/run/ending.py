"""Apart from the hooks: what the end of a run does to the weights that the user is left with, and to their copies.

Fingerprints of the factors tell whether the weights are still those that the run left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from ...adapters import LoraFactors, load_adapter, save_adapter
from ...adapters.files import saved_adapter
from ...live import Writer
from ...live.faults import Fault, attempt
from ...live.fingerprint import digest
from ...live.ranks import from_first
from ...record.entries import best_entry
from ...record.log import Log
from ...record.metrics import BEST_METRICS
from ...signals.losses import mean_loss
from ..trackers import Trackers, finite


@dataclass
class Marks:
    """What the factors were after this run's last work on them (`sealed`, with its step), and at the last epoch's end.

    Nothing is looked at where the run takes no final check (`wanted` false). Every method is collective as
    `Writer.gather`.
    """

    writer: Writer
    wanted: bool
    sealed: tuple[int, str] | None = None
    epoch: str | None = None

    def now(self) -> str | Fault | None:
        """Return the fingerprint of the factors as they are, or the first rank's fault; None where nobody wants it."""
        return from_first(attempt("measure", lambda: digest(self.writer.gather()))) if self.wanted else None

    def seal(self, step: int) -> None:
        """Remember what the factors are at `step`, to see later whether they are still those."""
        fingerprint = self.now()
        self.sealed = (step, fingerprint) if isinstance(fingerprint, str) else None

    def end_epoch(self) -> None:
        """Remember what the factors are at an epoch's end, to see later whether the trainer put others there."""
        fingerprint = self.now()
        self.epoch = fingerprint if isinstance(fingerprint, str) else None

    def sealed_at(self, step: int) -> bool:
        """Return whether it was at `step` that the factors were last sealed."""
        return self.sealed is not None and self.sealed[0] == step


def is_reloaded(args: TrainingArguments, state: TrainerState, epoch: str | None, now: str) -> bool:
    """Whether weights that are not those we left are the best checkpoint's.

    `epoch`: their fingerprint at the last epoch's end, `now`: that of today. Asked for is not done: of an adapter with
    a name of its own the trainer finds no file, and goes on with the last step's weights.
    """
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return False
    return state.best_global_step == state.global_step or epoch != now


def loss_of(model: Any, batches: Any) -> float | Fault:
    """Return the mean loss as `mean_loss`, or the fault of a model that gives none."""
    return attempt("evaluate", lambda: mean_loss(model, batches))


def note_best(
    log: Log, trackers: Trackers, args: TrainingArguments, state: TrainerState, losses: tuple[float, float | Fault]
) -> None:
    """Tell what the final merge did to the best model: its losses before and after, on the same batches."""
    before, after = finite(losses[0]), finite(losses[1] if isinstance(losses[1], float) else None)
    checkpoint = Path(str(state.best_model_checkpoint)).name
    log.note(best_entry(state.global_step, checkpoint, state.best_metric, before, after))
    numbers = dict(zip(BEST_METRICS, (before, after), strict=True))
    trackers.numbers(args, state, {key: value for key, value in numbers.items() if value is not None})


def engine_keeps_weights(folder: Path) -> bool:
    """Whether a checkpoint holds an engine's own copy of the weights, which a resume reads in the adapter's place."""
    return (folder / "latest").exists() or any(folder.glob("pytorch_model_fsdp*"))


def rewrite_adapter(folder: Path, adapter_name: str, factors: Mapping[str, LoraFactors]) -> None:
    """Put `factors` into the adapter of a checkpoint, in its own dtypes. Raises OSError, ValueError and KeyError."""
    place = saved_adapter(folder, adapter_name)
    saved = load_adapter(place, moved_base=True)
    merged = {
        name: replace(old, A=factors[name].A.to(old.A.dtype), B=factors[name].B.to(old.B.dtype))
        for name, old in saved.factors.items()
    }
    save_adapter(place, replace(saved, factors=merged))


def log_model_again(trackers: Trackers, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Log the merged adapter to W&B where the trainer, before this merge, has logged the model as an artifact."""
    if os.environ.get("WANDB_LOG_MODEL", "false").lower() in ("end", "checkpoint"):
        trackers.log_adapter(args, state, model)
