"""What will be done, before it is done: a frozen plan that prints as a table, and tells where it merges nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Unpack

from ..errors import PlanError
from ..io.knobs import Knob
from ..io.text_table import Table, html_table, render
from ..methods.how import AUTO, How
from .choices import Choices, PlanKnobs, choose
from .gates import Gate, Verdict, excluded, undecided
from .reading import Readings
from .weights import rules_in_force, weights_of
from .weights.registry import Weights


@dataclass(frozen=True, repr=False)
class MergePlan:
    """Which modules to merge and how, with the readings and reasons it was decided on.

    `verdicts` and `weights`, (w_live, w_safety, ...), have one entry a reading. `gate` has decided the first; its seed
    and step are, with a module's name, what random masks are drawn from. `how` holds the weights that were asked for,
    `rules` the knobs of the weights rules that made the module's of them. Make one with `MergePlan.decide`. Raises
    ConfigError for a knob that has no meaning and PlanError for verdicts that do not belong to the readings.
    """

    readings: Readings
    verdicts: Mapping[str, Verdict]
    gate: Gate
    how: How
    rules: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = Choices(self.gate, self.how, self.rules)
        _check_verdicts(self.readings, self.verdicts)
        _check_decided(self)
        weights = self.weights or weights_of(self.readings, self.how, self.gate, choices.rules, self.readings)
        object.__setattr__(self, "rules", MappingProxyType(dict(choices.rules)))
        object.__setattr__(self, "weights", MappingProxyType(dict(weights)))
        object.__setattr__(self, "verdicts", MappingProxyType(dict(self.verdicts)))

    @classmethod
    def decide(
        cls,
        readings: Readings,
        *,
        gate: str | Gate | None = None,
        method: str | How = AUTO,
        **knobs: Unpack[PlanKnobs],
    ) -> MergePlan:
        """Ask the gate about every reading. The defaults are the callback's: every module, by `method_of`.

        `gate`: its name with its knobs (those of `Gate`: threshold, num_layers, ...), or a `Gate`; without a name the
        gate whose knob is given, `all` without any. `method`: its name with its knobs (`space`, `density`, ...), or a
        `How`; auto is `linear`, for the adapters that `apply` is given, and `pull`, which needs none, where a strength
        is. `weights`: (0.8, 0.2) where left out; methods with a `strength` (pull, ema) take that instead.
        `module_weights`: pattern of names -> weights; a pattern fits a name or its end, as in PEFT's `rank_pattern`.
        Raises ConfigError for an unknown gate, knob, method, space or operator, weights that cannot be, a pattern that
        fits no module, more `num_layers` than there are modules, and a `density` that is outside (0, 1], missing, or
        given to a method that prunes nothing; as the gate does for readings that lack what it needs.
        """
        adapters = None if knobs.get("strength") is None else 0
        return cls.of(readings, choose(gate, method, knobs, adapters))

    @classmethod
    def of(cls, readings: Readings, choices: Choices) -> MergePlan:
        """Ask the gate of `choices` about every reading; raises as `decide`."""
        verdicts = choices.gate.verdicts(readings)
        if "subspace" in choices.how.needs:
            verdicts = {name: _projectable(readings, name, verdict) for name, verdict in verdicts.items()}
        return cls(readings, verdicts, choices.gate, choices.how, choices.rules)

    @property
    def method(self) -> str:
        """The method's name."""
        return self.how.method

    @property
    def space(self) -> str:
        """What is summed: `delta` or `factor`."""
        return self.how.space

    @property
    def threshold(self) -> float:
        """The cosine that gate `threshold` merges below."""
        return self.gate.threshold

    @property
    def num_layers(self) -> int | None:
        """How many modules gate `num_layers` merges; None for gates that do not count."""
        return self.gate.num_layers

    @property
    def seed(self) -> int:
        """The seed of whatever is drawn, modules or masks."""
        return self.gate.seed

    @property
    def step(self) -> int:
        """The optimizer step, by which every event draws anew."""
        return self.gate.step

    @property
    def varied(self) -> bool:
        """Whether modules may have weights of their own."""
        return any(rule.by_module for rule, _ in rules_in_force(self.rules, self.gate))

    @property
    def grouped(self) -> bool:
        """Whether modules share their weights with others; False where each has its own."""
        return all(rule.grouped for rule, _ in rules_in_force(self.rules, self.gate))

    def task_weight_of(self, name: str) -> float:
        """Return the share of a module's own update that this merge leaves; 1.0 for a method that takes none away."""
        return self.weights[name][0] if self.how.kind.takes_away else 1.0

    @property
    def selected(self) -> tuple[str, ...]:
        """The modules to merge, in the order of the readings."""
        return tuple(name for name in self.readings if self.verdicts[name].merge)

    @property
    def certified(self) -> tuple[str, ...]:
        """The modules decided on a compressed V, whose interval proves the exact measure's decision."""
        return tuple(name for name, reading in self.readings.items() if reading.interval)

    @property
    def reread(self) -> tuple[str, ...]:
        """The modules that a compressed V left open, so that the exact one was read."""
        return tuple(name for name, reading in self.readings.items() if reading.reread)

    @property
    def taken(self) -> dict[str, Any]:
        """The knobs that this method reads beyond the weights, and their values: what the journal adds."""
        return {**self.how.taken, **({"seed": self.seed} if self.how.kind.random else {})}

    @property
    def noted(self) -> dict[str, Any]:
        """The knobs of the weights rules in force that the journal adds, as JSON and YAML have them."""
        rules = rules_in_force(self.rules, self.gate)
        return {r.knob.name: listed(value) for r, value in rules if isinstance(r.knob, Knob)}

    @property
    def words(self) -> str:
        """Method, space, weights and further knobs, in words."""
        words = f"method {self.how.method}, space {self.how.space}, weights {_shown(self.how.weights)}"
        words += "".join(rule.phrase(value) for rule, value in reversed(rules_in_force(self.rules, self.gate)))
        return words + "".join(f", {name} {value}" for name, value in self.taken.items())

    def to_dict(self) -> dict[str, Any]:
        """Return what is decided, of the whole and of each module: its readings, whether it merges, and why."""
        modules = [
            {
                "name": name,
                "cosine": reading.cosine,
                "null_cosine": reading.null_cosine,
                "merge": self.verdicts[name].merge,
                "reason": self.verdicts[name].reason,
            }
            for name, reading in self.readings.items()
        ]
        gate = {"gate": self.gate.name, "knob": None if self.gate.criterion.knob is None else self.gate.knob}
        how = {**gate, "method": self.how.method, "space": self.how.space, "weights": self.how.weights}
        return {**how, "merged": len(self.selected), "modules": modules}

    def __str__(self) -> str:
        return render(*self._table())

    def __repr__(self) -> str:
        return f"MergePlan({self._title()})"

    def _repr_html_(self) -> str:
        """The same table as a notebook shows it."""
        return html_table(*self._table())

    def _table(self) -> Table:
        columns = ["module", "cosine", "null", "decision", "reason"]
        rows = []
        for name, r in self.readings.items():
            verdict = self.verdicts[name]
            words = "merge" if verdict.merge else "keep"
            rows.append([name, f"{r.cosine:.4f}", f"{r.null_cosine:.4f}", words, verdict.reason])
            if self.readings.approximate:
                rows[-1].insert(2, r.proof)
        if self.readings.approximate:
            columns.insert(2, "known as")
        return self._title(), columns, rows, ("cosine", "known as", "null")

    def _title(self) -> str:
        proof = f"; {len(self.certified)} certified by interval, {len(self.reread)} re-read exactly"
        title = f"{len(self.selected)} of {len(self.readings)} modules to merge: gate {self.gate}, {self.words}"
        return title + (proof if self.readings.approximate else "")


def listed(value: Any) -> Any:
    """Return `value` with dicts in the place of mappings and lists in that of tuples."""
    if isinstance(value, Mapping):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(weights: Sequence[float]) -> str:
    return " / ".join(f"{w:g}" for w in weights)


def _projectable(readings: Readings, name: str, verdict: Verdict) -> Verdict:
    if verdict.merge and not readings[name].comparable:
        return Verdict(False, "nothing to project on: aligned and unaligned are equal here")
    return verdict


def _check_verdicts(readings: Readings, verdicts: Mapping[str, Verdict]) -> None:
    strangers = sorted(set(readings) ^ set(verdicts))
    if strangers:
        raise PlanError(
            f"{len(strangers)} modules have a reading or a verdict but not both, the first is {strangers[0]!r}"
        )
    broken = [name for name, verdict in verdicts.items() if verdict.merge and not readings[name].finite]
    if broken:
        raise PlanError(f"module {broken[0]!r} holds an update that is not finite: it must not be merged")


def _check_decided(plan: MergePlan) -> None:
    open_ones = undecided(plan.readings, plan.gate)
    if open_ones:
        gate, first, proof = plan.gate.name, open_ones[0], plan.readings[open_ones[0]].proof
        raise PlanError(
            f"{len(open_ones)} modules were measured on a compressed subspace that leaves gate {gate!r} open, "
            f"the first is {first!r} ({proof}): give `measure` this gate and its knobs"
        )


def nothing_selected(plan: MergePlan) -> str:
    """Return what to tell a user whose plan selects no module: the gate, the closest module, and what to do."""
    module = closest(plan)
    if module is None:
        return f"nothing was merged: gate {plan.gate} had no module to decide on"
    return (
        f"nothing was merged: gate {plan.gate} selects none of {len(plan.readings)} modules. The closest is {module!r} "
        f"({plan.verdicts[module].reason}). Choose another gate or knob; gate 'all' merges every module"
    )


def closest(plan: MergePlan) -> str | None:
    """Return the module that lies least above what the gate merges below, in the gate's own unit; None without any.

    A module that no cosine decides comes last.
    """
    return min(plan.readings, key=lambda name: _distance(plan, name), default=None)


def _distance(plan: MergePlan, name: str) -> float:
    reading = plan.readings[name]
    return math.inf if excluded(reading) else plan.gate.distance(reading)
