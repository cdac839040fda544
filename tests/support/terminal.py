"""A terminal that a test can read: progress bars are drawn on nothing else."""

from __future__ import annotations

import io


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True
