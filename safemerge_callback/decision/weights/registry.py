"""The one registry of weights rules: a rule is a file, and describes itself there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack

from ...errors import ConfigError
from ...io.knobs import Knob, checked, unknown_knob
from ...methods.how import How
from ..gates import Gate
from ..reading import Readings

# Module -> (w_live, w_safety, ...).
Weights = Mapping[str, tuple[float, ...]]


class Case(NamedTuple):
    """What a rule may look at: how is merged, the gate, and what was measured, empty before the first check."""

    how: How
    gate: Gate
    readings: Readings


def _fits(_how: How) -> None:
    """Whatever is merged."""


@dataclass(frozen=True)
class WeightsRule:
    """A weights rule: `function(weights, value, case)` returns the weights of the same modules, changed.

    `knob`: what puts the rule in force, by a value that is neither None nor false nor empty: a `Knob` of its own, or
    the name of one of `Gate`'s; None for a rule that always holds. `value` is that knob's. `fits(how)` raises
    ConfigError where the rule cannot serve what is merged. `needs`: what must be there. `by_module`: whether modules
    may differ, so that the journal says each one's. `grouped`: whether many modules share their weights, so that those
    which do are computed together; False where each has its own, which only a weighted sum takes, as one number a
    module. `words(value)` ends the sentence on the weights.
    """

    name: str
    function: Callable[[Weights, Any, Case], Weights]
    knob: Knob | str | None = None
    fits: Callable[[How], None] = _fits
    needs: frozenset[str] = frozenset()
    by_module: bool = True
    grouped: bool = True
    words: Callable[[Any], str] | None = None

    def value(self, knobs: Mapping[str, Any], gate: Gate) -> Any:
        """Return the value that puts the rule in force; None, false or empty where it is not."""
        if self.knob is None:
            return True
        return knobs.get(self.knob.name) if isinstance(self.knob, Knob) else getattr(gate, self.knob)

    def phrase(self, value: Any) -> str:
        """Return the end of a sentence on the weights."""
        if self.words is not None:
            return self.words(value)
        return f", {self.knob.name} {value}" if isinstance(self.knob, Knob) else ""


class RuleDescription(TypedDict, total=False):
    """The fields of `WeightsRule` that say something of the rule."""

    fits: Callable[[How], None]
    needs: frozenset[str]
    by_module: bool
    grouped: bool
    words: Callable[[Any], str] | None


WEIGHTS: dict[str, WeightsRule] = {}


def weights_rule(*, knob: Knob | str | None = None, **about: Unpack[RuleDescription]) -> Callable[[Any], Any]:
    """Enter a rule under its function's own name; rules hold in the order in which they are entered."""

    def enter(function: Callable[..., Weights]) -> Callable[..., Weights]:
        WEIGHTS[function.__name__] = WeightsRule(function.__name__, function, knob, **about)
        return function

    return enter


def weights_knobs() -> tuple[str, ...]:
    """Return the names of the knobs that rules have declared."""
    return tuple(rule.knob.name for rule in WEIGHTS.values() if isinstance(rule.knob, Knob))


def rules_in_force(knobs: Mapping[str, Any], gate: Gate) -> list[tuple[WeightsRule, Any]]:
    """Return the rules that hold, in their order, each with its knob's value."""
    values = ((rule, rule.value(knobs, gate)) for rule in WEIGHTS.values())
    return [(rule, value) for rule, value in values if value]


def checked_rules(knobs: Mapping[str, Any], how: How, gate: Gate) -> dict[str, Any]:
    """Return the knobs of the rules that are in force, each in its own type; ConfigError as the rules raise it."""
    allowed = weights_knobs()
    if unknown := [name for name in knobs if name not in allowed]:
        raise unknown_knob(unknown[0], allowed, "weights")
    settled = checked(tuple(rule.knob for rule in WEIGHTS.values() if isinstance(rule.knob, Knob)), knobs, how=how)
    in_force = rules_in_force(settled, gate)
    for rule, _ in in_force:
        rule.fits(how)
    return {rule.knob.name: value for rule, value in in_force if isinstance(rule.knob, Knob)}


def weights_of(
    modules: Iterable[str], how: How, gate: Gate, knobs: Mapping[str, Any], readings: Readings | None = None
) -> dict[str, tuple[float, ...]]:
    """Return module -> (w_live, w_safety, ...), as the rules in force make it; raises as they do.

    Without `readings`, as before a first check, a rule that depends on them leaves the weights as they are.
    """
    weights: Weights = dict.fromkeys(modules, ())
    case = Case(how, gate, Readings(()) if readings is None else readings)
    for rule, value in rules_in_force(knobs, gate):
        weights = rule.function(weights, value, case)
    return dict(weights)


def check_additive(how: How, what: str, whose: str) -> None:
    """Raise ConfigError unless the merge is Σ wᵢ·ΔWᵢ; `what` was asked, and `whose` weights need it."""
    if not how.additive:
        raise ConfigError(
            f"{what} method {how.method!r} in space {how.space!r}: {whose} must be those of a sum of updates, "
            "so use method 'linear' or 'pull' in space 'delta'"
        )
