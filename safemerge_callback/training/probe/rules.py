"""What a probe may set off: a merge taken back, a merge asked for, the end of training. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ...errors import ConfigError, nearest, shown
from ...evaluation.probe import Answers
from ...evaluation.units import SHARE, number
from ...io.numbers import is_number, is_whole

Rule = TypeVar("Rule")
LOSS = "eval_loss"


@dataclass(frozen=True)
class Rollback:
    """Take a merge back that costs more than this: a fall of the task's score, a rise of the evaluation loss."""

    task: float | None = None
    eval_loss: float | None = None

    def __post_init__(self) -> None:
        if self.task is None and self.eval_loss is None:
            raise ConfigError(
                "rollback allows everything: give the most that a merge may cost, as task, eval_loss or both"
            )
        for name in ("task", "eval_loss"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value >= 0):
                raise ConfigError(f"rollback {name} is {shown(value)}: give a number of at least 0")


@dataclass(frozen=True)
class Trigger:
    """Merge where the share of harmful prompts that is refused falls under `below`.

    Not again within `cooldown` optimizer steps, nor, with `rearm`, before the share was seen at `rearm` or above.
    `measure` names one measure; without it, the share is over all harmful prompts.
    """

    below: float
    rearm: float | None = None
    cooldown: int = 0
    measure: str | None = None

    def __post_init__(self) -> None:
        _check_share("trigger", self.below)
        if self.rearm is not None and not (is_number(self.rearm) and self.below <= self.rearm <= 1):
            raise ConfigError(f"trigger rearm is {shown(self.rearm)}: give a share from below ({self.below}) to 1")
        if not is_whole(self.cooldown, 0):
            raise ConfigError(f"trigger cooldown is {shown(self.cooldown)}: give 0 or more optimizer steps")
        _check_measure("trigger", self.measure)


@dataclass(frozen=True)
class Stop:
    """End the training where that share is under `below` at `patience` periodic probes in a row."""

    below: float
    patience: int = 1
    measure: str | None = None

    def __post_init__(self) -> None:
        _check_share("stop", self.below)
        if not is_whole(self.patience, 1):
            raise ConfigError(f"stop patience is {shown(self.patience)}: give 1 probe or more")
        _check_measure("stop", self.measure)


@dataclass(frozen=True)
class Standing:
    """Where rules stand: step of the last trigger, whether the next may come, probes in a row under stop's share."""

    triggered_at: int | None = None
    armed: bool = True
    low: int = 0


def as_rule(kind: type[Rule], settings: Any) -> Rule | None:
    """Return a rule from one, from a mapping of its settings, or None; ConfigError for an unknown setting."""
    if settings is None or isinstance(settings, kind):
        return settings
    name = kind.__name__.lower()
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{name} is {settings!r}: give {kind.__name__}(...) or a mapping of its settings")
    allowed = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in settings:
        if key not in allowed:
            raise ConfigError(
                f"{name} has no setting {key!r}{nearest(str(key), allowed, then=f'choose among {allowed}')}"
            )
    if "below" in allowed and "below" not in settings:
        raise ConfigError(f"{name} lacks 'below': give the share of harmful prompts refused under which it acts")
    return kind(**settings)


def costs_too_much(rule: Rollback, before: Answers, after: Answers) -> str | None:
    """Return why a merge must be taken back, from the probes before and after it; None where it may stay.

    What was not measured on both sides is not known to have cost anything.
    """
    task, then, unit = _task(after), _task(before), _unit(after)
    if rule.task is not None and task is not None and then is not None and then - task > rule.task:
        return f"the task's score fell from {number(then)} to {number(task)}{unit}, more than the {rule.task:g} allowed"
    loss, past = (answers.value("task", measure=LOSS) for answers in (after, before))
    if rule.eval_loss is not None and loss is not None and past is not None and loss - past > rule.eval_loss:
        return (
            f"the evaluation loss rose from {number(past)} to {number(loss)}, more than the {rule.eval_loss:g} allowed"
        )
    return None


def triggers(rule: Trigger, standing: Standing, step: int, answers: Answers) -> tuple[str | None, Standing]:
    """Return why a merge is asked for at `step`, or None, and where the rule then stands."""
    share = answers.value("harm", measure=rule.measure)
    if share is None:
        return None, standing
    if rule.rearm is not None and share >= rule.rearm:
        standing = replace(standing, armed=True)
    since = None if standing.triggered_at is None else step - standing.triggered_at
    cooling = since is not None and since <= rule.cooldown
    if share >= rule.below or cooling or not standing.armed:
        return None, standing
    reason = f"{rule.measure or 'the share of harmful prompts refused'} is {share:.1%}, below {rule.below:.1%}"
    return reason, replace(standing, triggered_at=step, armed=rule.rearm is None)


def stops(rule: Stop, standing: Standing, answers: Answers) -> tuple[str | None, Standing]:
    """Return why training must end, or None, and where the rule then stands."""
    share = answers.value("harm", measure=rule.measure)
    if share is None:
        return None, standing
    standing = replace(standing, low=standing.low + 1 if share < rule.below else 0)
    if standing.low < rule.patience:
        return None, standing
    what = rule.measure or "the share of harmful prompts refused"
    return f"{what} is {share:.1%}, below {rule.below:.1%} at {standing.low} probes in a row", standing


def lacking(rule: Rollback | Trigger | Stop, answers: Answers | None) -> str | None:
    """Return, in words, a figure that the rule rests on and the probe did not measure; None where it has them all."""
    if isinstance(rule, Rollback):
        if rule.task is not None and (answers is None or _task(answers) is None):
            return "the task's score"
        if rule.eval_loss is not None and (answers is None or answers.value("task", measure=LOSS) is None):
            return "the evaluation loss"
        return None
    share = None if answers is None else answers.value("harm", measure=rule.measure)
    return (rule.measure or "the share of harmful prompts refused") if share is None else None


def _task(answers: Answers) -> float | None:
    scores = [m["value"] for m in answers.measures if m["kind"] == "task" and m["measure"] != LOSS]
    return scores[0] if scores else None


def _unit(answers: Answers) -> str:
    """The unit of the task's score, after a number; a share is told as the rule's own setting is, as a part of 1."""
    units = [m["unit"] for m in answers.measures if m["kind"] == "task" and m["measure"] != LOSS]
    return f" {units[0]}" if units and units[0] not in ("", SHARE) else ""


def _check_share(name: str, below: float) -> None:
    if not is_number(below) or not 0 < below <= 1:
        raise ConfigError(f"{name} below is {shown(below)}: give a share above 0, up to 1")


def _check_measure(name: str, measure: Any) -> None:
    if measure is not None and not isinstance(measure, str):
        raise ConfigError(f"{name} measure is {shown(measure)}: give the name of one measure, or leave it out")
