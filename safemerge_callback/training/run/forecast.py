"""What a run is going to do, told before its first step: how many merges, and what they leave of the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...decision import share_left
from ...decision.weights import weights_of
from ..config.settings import SafeMergeConfig
from .decide import choices_of, merge_steps

# Below this share of what the task had trained, a run is told before it begins.
WORTH_WARNING = 0.2


class Forecast(NamedTuple):
    """`merges`: merge events from now on by the schedule. `left`: the share of the task's early update after them.

    Early is what was trained before the first of them, and the share that of the module which keeps the least; None for
    a method that takes none away. `exact`: every event merges every module, so that both are no bounds.
    """

    merges: int
    left: float | None
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, for the journal."""
        return self._asdict()


def forecast(
    config: SafeMergeConfig,
    names: Sequence[str],
    max_steps: int,
    step: int = 0,
    task_weights: Mapping[str, float] | None = None,
) -> Forecast:
    """Return what the settings plan from optimizer step `step` on for the modules `names`.

    `task_weights`: module -> share that the merges before a resume have left, 1 where there was none. Only what is
    planned counts: a probe's trigger may merge more often, and a rollback less.
    """
    if not config.merges:
        return Forecast(0, None, exact=True)
    merges = sum(at > step for at in merge_steps(config, max_steps))
    exact = config.gate_at().criterion.whole
    if not config.how.kind.takes_away:
        return Forecast(merges, None, exact)
    past, weights = task_weights or {}, _task_weights(config, names, max_steps)
    left = [share_left(w, merges, config.min_task_weight, past.get(name, 1.0)) for name, w in weights.items()]
    return Forecast(merges, min(left, default=1.0), exact)


def _task_weights(config: SafeMergeConfig, names: Sequence[str], max_steps: int) -> dict[str, float]:
    """What one merge leaves of each module's update, soft weights where they change it most."""
    choices = choices_of(config, max_steps=max_steps)
    return {name: weights[0] for name, weights in weights_of(names, choices.how, choices.gate, choices.rules).items()}


def too_strong(config: SafeMergeConfig, plan: Forecast, max_steps: int) -> str | None:
    """Return what to warn of where the planned merges leave little of the task; None where they do not.

    A single merge leaves what its weights say, and so do weights that are spread over the run: only what merges
    compound to can surprise.
    """
    if plan.left is None or plan.left >= WORTH_WARNING or config.spread_weights or plan.merges < 2:
        return None
    most, least = ("", "") if plan.exact else ("up to ", "as little as ")
    return (
        f"{most}{plan.merges} merges in {max_steps:,} steps (every={config.every:g}) leave {least}{percent(plan.left)} "
        "of what the task trains before the first of them: merge less often (every=0.167 is six times a run, whatever "
        "its length), lower the strength, let spread_weights=true share one merge's weights out over the run, or set "
        "min_task_weight"
    )


def percent(share: float) -> str:
    """Return a share in %, two digits where it is small."""
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"
