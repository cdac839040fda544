"""What a run says to the person at the terminal: a line for what was done, a warning once for what went wrong."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ...io.printable import printable


@dataclass
class Log:
    """Handed to whoever must speak. Only the first rank has lines; `quiet` silences them, and no warning.

    Lines go to stdout, as the trainer's own do, above a progress bar where there is one.
    """

    quiet: bool = False
    first_rank: bool = True
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
