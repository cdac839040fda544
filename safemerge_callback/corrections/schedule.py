"""When to check and when to only measure: pure functions of step numbers. All steps are optimizer steps, from 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, shown
from ..io.choices import truth
from ..io.numbers import is_number, is_whole


def check_steps(name: str, steps: Any) -> float:
    """Return a setting in optimizer steps or, below 1, as a share of the run's; ConfigError for anything else.

    A command line gives whole numbers as floats.
    """
    if not is_number(steps) or steps < 0 or (steps > 1 and steps % 1):
        raise ConfigError(f"{name} is {shown(steps)}: give a whole number, or a share of the run's steps below 1")
    return steps if 0 < steps < 1 else int(steps)


def check_bounds(from_step: int, until_step: int | None) -> None:
    """Raise ConfigError where the last step comes before the first."""
    if until_step is not None and until_step < from_step:
        raise ConfigError(f"until_step {until_step} comes before from_step {from_step}: swap them, or leave one out")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a correction is due, in optimizer steps; a correction's own settings are made of it and what it adds.

    `every`: steps from one time to the next, or, below 1, a share of the run's; 0: never in between. `from_step` and
    `until_step` bound that, both included. `at_train_end`: once more at the run's last step. ConfigError for anything
    else, and where it would never be due.
    """

    every: float = 1
    from_step: int = 0
    until_step: int | None = None
    at_train_end: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", check_steps("every", self.every))
        for name in ("from_step", "until_step"):
            value = getattr(self, name)
            if not is_whole(value, 0) and not (value is None and name == "until_step"):
                raise ConfigError(f"{name} is {shown(value)}: give a whole number of 0 or more")
        check_bounds(self.from_step, self.until_step)
        if not truth(self.at_train_end, "at_train_end") and self.every == 0:
            raise ConfigError("every is 0 and at_train_end is false, so it would never be due: set one of them")

    def __str__(self) -> str:
        """Such as `every=2, from_step=0, until_step=None`."""
        return f"every={self.every:g}, from_step={self.from_step}, until_step={self.until_step}"

    def ever(self, max_steps: int) -> bool:
        """Return whether it is due anywhere in a run of `max_steps`."""
        return self.at_train_end or bool(
            periodic_checks(max_steps, every=self.every, from_step=self.from_step, until_step=self.until_step)
        )

    def due(self, step: int, max_steps: int, *, last: bool = False) -> bool:
        """Return whether it is due at `step` of `max_steps`, which is the run's last or not."""
        every = interval(self.every, max_steps)
        periodic = due(step, every=every, from_step=self.from_step, until_step=self.until_step)
        return periodic or (last and self.at_train_end)


def interval(every: float, max_steps: int) -> int:
    """Return `every` in optimizer steps; below 1 it is a share of the run's, rounded up as transformers does it."""
    return math.ceil(every * max_steps) if 0 < every < 1 else int(every)


def due(step: int, *, every: int, from_step: int = 0, until_step: int | None = None) -> bool:
    """Whether a periodic check falls on `step`: a multiple of `every` (0: never), within both bounds, both included."""
    if every <= 0 or step <= 0 or step % every:
        return False
    return from_step <= step and (until_step is None or step <= until_step)


def final_due(step: int, *, max_steps: int, stopping: bool, final_step: int | None) -> bool:
    """Whether `step` ends the run and still lacks its final check.

    `final_step` is where a final check already happened. A finished run that is resumed to the same `max_steps` takes
    no second one; one that is resumed to go further does, at its new end.
    """
    if final_step is not None and final_step >= min(step, max_steps):
        return False
    return stopping or step >= max_steps


def merge_events(
    max_steps: int,
    *,
    every: float,
    from_step: int = 0,
    until_step: int | None = None,
    cooldown: int = 0,
    at_train_end: bool = True,
    asynchronous: bool = False,
) -> list[int]:
    """Return the steps at which a run of `max_steps` merges a module that every check selects; `every` as `interval`.

    A check that is measured beside a step merges after it. At the last step one check decides, the final one. Each
    merge starts a cooldown.
    """
    checks = periodic_checks(max_steps, every=every, from_step=from_step, until_step=until_step)
    steps = {min(s + 1, max_steps) if asynchronous else s for s in checks} | ({max_steps} if at_train_end else set())
    merges: list[int] = []
    for step in sorted(steps):
        if cooling(step, last_merge=merges[-1] if merges else None, cooldown=cooldown) is None:
            merges.append(step)
    return merges


def periodic_checks(max_steps: int, *, every: float, from_step: int = 0, until_step: int | None = None) -> list[int]:
    """Return the steps of the periodic checks in a run of `max_steps`; `every` as `interval`."""
    steps_between = interval(every, max_steps)
    multiples = range(steps_between, max_steps + 1, steps_between) if steps_between > 0 else ()
    return [s for s in multiples if due(s, every=steps_between, from_step=from_step, until_step=until_step)]


def cooling(step: int, *, last_merge: int | None, cooldown: int) -> str | None:
    """Why a check at `step` must only measure, or None where it may merge.

    The `cooldown` steps after a merge, and the merged step itself (an untrained model would only lose more of the
    task's update), are not merged.
    """
    if last_merge is None or not 0 <= step - last_merge <= cooldown:
        return None
    if step == last_merge:
        return f"already merged at step {last_merge}"
    return f"cooldown: {step - last_merge} of {cooldown} steps since the merge at step {last_merge}"
