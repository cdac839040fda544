"""The average of a run's own updates: taken in as it trains, saved with checkpoints, and given to method `ema`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters import Adapter
from ..decision import Average
from ..live.faults import Fault, attempt
from ..live.ranks import from_first
from .config.settings import SafeMergeConfig

if TYPE_CHECKING:
    from .run.session import Session
    from .run.state import Past


def sources(session: Session) -> Sequence[Adapter]:
    """Return what the method merges in: the run's average where it needs that, else the safety adapters.

    Collective as `writer.gather` where there is an average.
    """
    average = session.average
    return session.safety if average is None else (average.adapter(session.writer.gather()),)


def follow(session: Session, step: int) -> None:
    """Take the updates of `step` into the average where it is time. Collective as `writer.gather`.

    Where it fails the average stays as it was, and that is told once; the training goes on.
    """
    average, every = session.average, session.config.ema_every
    if average is None or not every or step % every:
        return
    done = attempt("average", lambda: average.follow(session.writer.gather()))
    if isinstance(done, Fault):
        words = f"the average of the run's updates lacks step {step}, training goes on: {done.error}"
        session.log.fault(step, done, words)


def save_average(average: Average | None, folder: Path, save: str = "") -> None:
    """Put the average, if there is one, beside the weights of a checkpoint, as part of `save`. Raises OSError."""
    if average is not None:
        average.save(folder, save)


def load_average(config: SafeMergeConfig, folders: Sequence[Path], save: str | None = None) -> Average | None:
    """Return the average that `save` (None: any) put into the first of these folders that has one.

    AdapterError where it cannot be read.
    """
    found = (Average.load(folder, float(config.ema_decay or 0.0), save) for folder in folders)
    return next((average for average in found if average is not None), None)


def rewind_average(session: Session, past: Past) -> None:
    """Take over the average of the checkpoint that the weights were reloaded from; without one it stays."""
    if session.average is None:
        return
    found = attempt("average", lambda: past.average(session.config))
    if isinstance(found, Average):
        session.average = found
    session.average = from_first(session.average)
