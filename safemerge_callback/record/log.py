"""What a run says and writes of itself as it goes: a line, a warning once, an entry in the journal, a fault."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..io.printable import printable
from ..live.faults import Fault, attempt
from .entries import error_entry
from .journal import Journal
from .progress import Progress


@dataclass
class Log:
    """Handed to whoever must speak; nothing that it cannot say or write ever costs the training.

    Only the first rank has lines; `quiet` silences them, and no warning. Lines go to stdout, as the trainer's own do,
    above a progress bar where there is one. `journal` takes the entries, None: none are kept; `progress` counts them.
    Where there is a log `beneath`, its journal takes them, by way of it: what fails is warned of once for both.
    `alert(step, about, title, text, said=True)` tells a person elsewhere of a fault, once for each `about`.
    """

    quiet: bool = False
    first_rank: bool = True
    journal: Journal | None = None
    progress: Progress = field(default_factory=Progress)
    beneath: Log | None = None
    alert: Callable[..., None] | None = None
    warned: set[str] = field(default_factory=set)

    def say(self, text: str, who: str = "safemerge: ") -> None:
        """Print one line; a terminal that is closed or full costs the lines, never the training."""
        if self.quiet or not self.first_rank:
            return
        from tqdm import tqdm

        try:
            tqdm.write(printable(who + text))
        except Exception:
            # stdout may be anything that a notebook, a logger or a test runner puts in its place.
            self.quiet = True

    def warn(self, kind: str, message: str, stacklevel: int = 2) -> None:
        """Warn once a run for each `kind`, on every rank; the warning is the caller's with the default `stacklevel`."""
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(f"safemerge: {message}", stacklevel=stacklevel)

    def note(self, entry: Mapping[str, Any]) -> None:
        """Append to the journal; a journal that fails is warned of once, and takes the entry with the next one."""
        if self.beneath is not None:
            self.beneath.note(entry)
        if self.journal is None:
            return
        try:
            self.progress.journal_entries += self.journal.append(entry)
        except OSError as error:
            words = (
                f"the journal lacks entries from step {entry.get('step')} on ({error}): free the disk, and they are "
                "written with the next one"
            )
            self.warn("journal", words, stacklevel=3)

    def fault(
        self, step: int, fault: Fault, message: str, *, kind: str | None = None, alert: str | None = None
    ) -> None:
        """Note what went wrong at `step`, and warn of it in the words of `message`, once for each `kind`.

        The kind is where it went wrong, unless another is given. With `alert`, a title, a person is told elsewhere too.
        """
        self.note(error_entry(step, fault.where, fault.error))
        self.warn(kind or fault.where, message, stacklevel=3)
        if alert and self.alert:
            text = f"{fault.where}, step {step}: {fault.error}"
            self.alert(step, "fault", f"safemerge: {alert}", text, said=True)

    def tell(self, step: int, action: Callable[[], None]) -> None:
        """Do what only tells of a step: no figure, whatever it is, may cost the training."""
        done = attempt("report", action)
        if isinstance(done, Fault):
            self.fault(step, done, f"not all of step {step} could be told, training goes on: {done.error}")
