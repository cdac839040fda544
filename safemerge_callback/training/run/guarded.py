"""What a run under guard hands to another callback that looks at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...corrections.change import Witness
from ...record.log import Log
from ..trackers import Trackers
from .clock import Clock


@dataclass(frozen=True)
class GuardedRun:
    """The parts of a run that a probe of it works with.

    `measures`: whether there are checks; `merges`: whether one may merge; `changes`: whether a merge or another change
    of the factors may come that could be taken back. `watch` takes who looks at its
    changes; ConfigError where somebody does. `check_now` lets it check and merge at this step, which its own schedule
    does not ask for; given why a check that was begun before must not merge.
    """

    measures: bool
    merges: bool
    changes: bool
    log: Log
    trackers: Trackers
    clock: Clock
    watch: Callable[[Witness], None]
    check_now: Callable[[str], None]
