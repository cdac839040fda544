"""Fingerprints of the factors at moments of a run, by which it knows later whether they are still those."""

from __future__ import annotations

from dataclasses import dataclass

from ...live import Writer
from ...live.faults import Fault, attempt
from ...live.fingerprint import digest
from ...live.ranks import from_first


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
