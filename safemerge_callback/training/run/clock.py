"""What a run's hooks cost: their wall clock, and that of the training that they are a part of; and when that logs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from transformers import TrainerState, TrainingArguments

from ...record.progress import Progress


@dataclass
class Clock:
    """Counts the seconds of hooks and of training on top of what `progress` has of earlier parts of the run.

    `begun`: when this part of the training began, None once it has ended. `since`: when the hook that runs now began.
    `left_out`: seconds that counted neither as this callback's nor as training's.
    """

    progress: Progress
    begun: float | None = field(default_factory=time.perf_counter)
    since: float | None = None
    left_out: float = 0.0

    @contextmanager
    def hook(self) -> Iterator[None]:
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
    def now(self) -> Progress:
        """The progress with the seconds of this moment."""
        return replace(self.progress, seconds=self.seconds, training_seconds=self.training_seconds)

    def leave_out(self, seconds: float) -> None:
        """Count `seconds` that have just passed neither as this callback's nor as training's."""
        self.left_out += seconds
        self.since = None if self.since is None else self.since + seconds
        self.begun = None if self.begun is None else self.begun + seconds

    def stop(self) -> None:
        """Training has ended: its seconds are those of now."""
        self.progress.training_seconds, self.begun = self.training_seconds, None


def logged_at(step: int, args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the trainer logs after this step, as far as that is known before it: not at the end of an epoch."""
    every = state.logging_steps if args.logging_strategy == "steps" else 0
    return bool(every and step % every == 0) or (args.logging_first_step and step == 1)
