"""Which, how and how much, out of the knobs by name: each goes to the one that has declared it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..io.knobs import unknown_knob
from ..methods.how import How, HowKnobs, as_how, how_knobs, method_of
from ..methods.weights import check_merge
from .gates import Gate, Knobs, as_gate, gate_knobs
from .weights import checked_rules, weights_knobs
from .weights.by_pattern import MODULE_WEIGHTS, check_module_weights


class PlanKnobs(HowKnobs, Knobs, total=False):
    """Every knob of a merge by name, for type checkers; a registered gate, method or rule may have further ones."""

    module_weights: Mapping[str, Sequence[float]] | None
    focal: Mapping[str, Any] | Sequence[str] | None
    learned: Mapping[str, Any] | str | None


@dataclass(frozen=True)
class Choices:
    """What a merge is decided by: the gate, how, and the knobs of the weights rules in force. Checked when made."""

    gate: Gate
    how: How
    rules: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", checked_rules(self.rules, self.how, self.gate))


def choose(
    gate: str | Gate | None, method: str | How, knobs: Mapping[str, Any], adapters: int | None = None
) -> Choices:
    """Return what these knobs choose; one that nobody has declared is refused.

    `gate` and `method`: names, or what is made already. `adapters`: how many safety adapters there are; None where they
    are named later. Raises ConfigError as `as_gate`, `as_how` and the weights rules do.
    """
    rules, how = _part(knobs, weights_knobs()), _part(knobs, how_knobs())
    known = (*gate_knobs(), *how_knobs(), *weights_knobs())
    if unknown := [name for name in knobs if name not in known]:
        raise unknown_knob(unknown[0], known, "a merge")
    which = as_gate(gate, {name: value for name, value in knobs.items() if name not in rules and name not in how})
    if isinstance(method, str):
        sets = rules.get(MODULE_WEIGHTS.name)
        method = method_of(method, adapters, how.get("weights"), sets, how.get("space", "delta"))
    return Choices(which, as_how(method, how, adapters), rules)


def check_counts(choices: Choices, adapters: int) -> None:
    """Raise ConfigError unless there are weights for so many safety adapters, one more than there are."""
    how, sets = choices.how, choices.rules.get(MODULE_WEIGHTS.name)
    check_merge(how.method, how.space, how.weights, adapters)
    check_module_weights(how.method, how.space, sets, adapters)


def _part(knobs: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in knobs.items() if name in names}
