"""What a check decides: the gate's verdicts, less the merges that would be one too many."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ...corrections.schedule import cooling, merge_events, periodic_checks
from ...decision import Choices, MergePlan, Readings, Verdict, above, not_rearmed, under_floor, without
from ...decision.weights.spread import one_of_many
from ...errors import ConfigError
from ...live.faults import Fault
from ...record.progress import Progress
from ..config.settings import SafeMergeConfig


class CheckMoment(NamedTuple):
    """Where a run stands at a check: optimizer step, the step its weights are from, and the run's last step.

    `began` is a clock. `final`: whether it is the run's last check. `hold` says why nothing must be merged.
    `measured_at`: the step beside which the weights were measured, where it is an earlier one.
    """

    step: int
    weights_of: int
    max_steps: int
    began: float = 0.0
    final: bool = False
    hold: str | None = None
    measured_at: int | None = None


def choices_of(config: SafeMergeConfig, step: int = 0, max_steps: int | None = None) -> Choices:
    """What the settings choose at `step`; with `max_steps` the weights are those of one merge event.

    That is a difference only where the settings spread their weights over the run.
    """
    events = events_of(config, max_steps) if config.spread_weights and max_steps is not None else 1
    how, rules = config.how, config.rules
    if events > 1:
        how, rules = one_of_many(how, rules, events)
    return Choices(config.gate_at(step), how, rules)


def events_of(config: SafeMergeConfig, max_steps: int) -> int:
    """Return how often a run of `max_steps` may merge a module by its schedule, 1 at least."""
    return max(1, len(merge_steps(config, max_steps)))


def check_schedule_of_run(config: SafeMergeConfig, max_steps: int) -> str | None:
    """Return what to warn of where no periodic check falls into a run of so many steps; ConfigError where none at all.

    A method `ema` whose average would never take an update in is refused too.
    """
    if not config.measures:
        return None
    if config.merges and config.ema_every is not None and config.ema_every > max_steps:
        raise ConfigError(
            f"ema_every is {config.ema_every} and the run has {max_steps} steps, so the average would never take an "
            "update in: lower it"
        )
    bounds = {"every": config.every, "from_step": config.from_step, "until_step": config.until_step}
    if config.every == 0 or periodic_checks(max_steps, **bounds):  # type: ignore[arg-type]
        return None
    words = ", ".join(f"{name}={value:g}" for name, value in bounds.items() if value)
    said = f"no periodic check falls into this run of {max_steps} steps ({words})"
    if not config.at_train_end:
        raise ConfigError(
            f"{said}, and at_train_end is false, so none would ever happen: "
            "choose every, from_step and until_step so that one does, or set at_train_end to true"
        )
    return f"{said}: only the one at the end happens"


def merge_steps(config: SafeMergeConfig, max_steps: int) -> list[int]:
    """Return the optimizer steps at which a run of `max_steps` merges a module that every check selects."""
    return merge_events(
        max_steps,
        every=config.every,
        from_step=config.from_step,
        until_step=config.until_step,
        cooldown=config.cooldown,
        at_train_end=config.at_train_end,
        asynchronous=config.asynchronous,
    )


class Decision(NamedTuple):
    """What the first rank tells the others: readings, verdicts, and the modules seen above the gate."""

    readings: Readings
    verdicts: dict[str, Verdict]
    seen: frozenset[str]


def decided(
    readings: Readings | Fault, config: SafeMergeConfig, progress: Progress, moment: CheckMoment
) -> Decision | Fault:
    """Return what a check decides; a fault stays one.

    Held back, the reason saying so: every merge where the moment says why or the cooldown lasts, those of modules that
    were merged and not yet seen above the gate again, and those that would push a module's compounded task weight under
    the floor. Raises as `MergePlan.decide`.
    """
    if isinstance(readings, Fault):
        return readings
    plan = MergePlan.of(readings, choices_of(config, moment.step, moment.max_steps))
    seen = above(plan)
    pause = moment.hold or cooling(moment.weights_of, last_merge=progress.last_merge, cooldown=config.cooldown)
    if pause is not None:
        plan = without(plan, dict.fromkeys(plan.selected, pause))
    plan = without(plan, not_rearmed(plan, still_disarmed(progress.disarmed, seen)))
    plan = without(plan, under_floor(plan, progress.task_weights, config.min_task_weight))
    return Decision(readings, dict(plan.verdicts), seen)


def agreed_plan(decision: Decision, config: SafeMergeConfig, moment: CheckMoment) -> MergePlan:
    """Return the plan of the first rank's decision, by this rank's own settings: `apply` finds out if they differ."""
    choices = choices_of(config, moment.step, moment.max_steps)
    return MergePlan(decision.readings, decision.verdicts, choices.gate, choices.how, choices.rules)


def still_disarmed(disarmed: Collection[str], seen: frozenset[str]) -> list[str]:
    """Return the merged modules that were not yet seen above the gate, in order."""
    return [name for name in disarmed if name not in seen]
