"""What goes wrong in a check costs the check, never the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .ranks import ProcessesError

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Fault:
    """What went wrong, where; it travels between processes in place of an answer."""

    where: str
    error: str


def attempt(where: str, action: Callable[[], Answer]) -> Answer | Fault:
    """Return what `action` does, or the fault: whatever goes wrong in here must not cost the user the training.

    Except that ranks disagree: to go on would let them drift apart, so a ProcessesError is raised on.
    """
    try:
        return action()
    except ProcessesError:
        raise
    except Exception as error:
        return Fault(where, f"{type(error).__name__}: {error}")
