"""What will be done, before it is done: a frozen plan that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Unpack

from ..errors import PlanError
from ..io.text_table import Table, html_table, render
from ..methods import check_density, check_majority_sign, get_method
from .certify import undecided
from .gates import Gate, Knobs, Verdict, as_gate
from .operators import check_operator
from .reading import Readings
from .strength import attenuated, check_soft
from .weights import check_merge, check_module_weights, check_patterns, merge_weights, method_of, pattern_of


@dataclass(frozen=True, repr=False)
class MergePlan:
    """Which modules to merge and how, with the readings and reasons it was decided on.

    `verdicts` has one entry a reading; `weights` are (w_live, w_safety, ...), one for each safety adapter, with a soft
    `rule` those at a cosine of 0. `module_weights`: pattern -> weights for the modules whose name it fits, the first
    that fits. `operator` and `operator_rank` are method `project`'s. `density` and `majority_sign_method` are for the
    methods that read them; the rule's seed and step are, with a module's name, what random masks are drawn from. Make
    one with `MergePlan.decide`. Raises ConfigError for a knob that has no meaning and PlanError for verdicts that do
    not belong to the readings.
    """

    readings: Readings
    verdicts: Mapping[str, Verdict]
    rule: Gate
    method: str
    space: str
    weights: tuple[float, ...]
    density: float | None = None
    majority_sign_method: str = "total"
    module_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    operator: str | None = None
    operator_rank: int | None = None

    def __post_init__(self) -> None:
        weights = check_merge(self.method, self.space, self.weights)
        others = check_module_weights(self.method, self.space, self.module_weights, len(weights) - 1)
        check_patterns(others, list(self.readings))
        operator, rank = check_operator(self.method, self.operator, self.operator_rank)
        check_soft(self.rule.soft, self.method, self.space)
        object.__setattr__(self, "density", check_density(self.method, self.density))
        check_majority_sign(self.method, self.majority_sign_method)
        _check_verdicts(self.readings, self.verdicts)
        _check_decided(self)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "module_weights", MappingProxyType(others))
        object.__setattr__(self, "operator", operator)
        object.__setattr__(self, "operator_rank", rank)
        object.__setattr__(self, "verdicts", MappingProxyType(dict(self.verdicts)))

    @classmethod
    def decide(
        cls,
        readings: Readings,
        *,
        gate: str | Gate | None = None,
        method: str = "auto",
        space: str = "delta",
        weights: Sequence[float] | None = None,
        module_weights: Mapping[str, Sequence[float]] | None = None,
        strength: float | None = None,
        operator: str | None = None,
        operator_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        **knobs: Unpack[Knobs],
    ) -> MergePlan:
        """Ask the gate about every reading. The defaults are the callback's: every module, by `method_of`.

        `gate`: its name with its knobs (those of `Gate`: threshold, num_layers, ...), or a `Gate`; without a name the
        gate whose knob is given, `all` without any. `method` auto is `linear`, for the adapters that `apply` is given,
        and `pull`, which needs none, where a strength is. `weights`: (0.8, 0.2) where left out; methods with a
        `strength` (pull, ema) take that instead. `module_weights`: pattern of names -> weights; a pattern fits a name
        or its end, as in PEFT's `rank_pattern`. Raises ConfigError for an unknown gate, knob, method, space or
        operator, weights that cannot be, a pattern that fits no module, more `num_layers` than there are modules, and a
        `density` that is outside (0, 1], missing, or given to a method that prunes nothing; as the gate does for
        readings that lack what it needs.
        """
        rule, adapters = as_gate(gate, knobs), None if strength is None else 0
        method = method_of(method, adapters, weights, module_weights, space)
        checked = check_merge(method, space, merge_weights(method, weights, strength))
        others = check_module_weights(method, space, module_weights, len(checked) - 1)
        share, sign = check_density(method, density), check_majority_sign(method, majority_sign_method)
        verdicts = rule.verdicts(readings)
        if "subspace" in get_method(method).needs:
            verdicts = {name: _projectable(readings, name, verdict) for name, verdict in verdicts.items()}
        return cls(readings, verdicts, rule, method, space, checked, share, sign, others, operator, operator_rank)

    @property
    def gate(self) -> str:
        """The gate's name."""
        return self.rule.name

    @property
    def threshold(self) -> float:
        """The cosine that gate `threshold` merges below."""
        return self.rule.threshold

    @property
    def num_layers(self) -> int | None:
        """How many modules gate `num_layers` merges; None for gates that do not count."""
        return self.rule.num_layers

    @property
    def seed(self) -> int:
        """The seed of whatever is drawn, modules or masks."""
        return self.rule.seed

    @property
    def step(self) -> int:
        """The optimizer step, by which every event draws anew."""
        return self.rule.step

    def asked_of(self, name: str) -> tuple[float, ...]:
        """Return the weights that were asked for a module: those of the first pattern that fits it, or `weights`."""
        pattern = pattern_of(name, self.module_weights)
        return self.weights if pattern is None else self.module_weights[pattern]

    def weights_of(self, name: str) -> tuple[float, ...]:
        """Return (w_live, w_safety, ...) of a module: those asked, for a soft rule less of a change, by its cosine."""
        reading, asked = self.readings[name], self.asked_of(name)
        limit = self.rule.limit(reading) if self.rule.soft else None
        return asked if limit is None else attenuated(asked, reading.cosine, limit)

    @property
    def varied(self) -> bool:
        """Whether modules may have weights of their own."""
        return self.rule.soft or bool(self.module_weights)

    def task_weight_of(self, name: str) -> float:
        """Return the share of a module's own update that this merge leaves; 1.0 for a method that takes none away."""
        return self.weights_of(name)[0] if get_method(self.method).takes_away else 1.0

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
        takes = get_method(self.method).takes
        names: list[str] = [name for name in ("density", "majority_sign_method") if name in takes]
        names += ["seed"] if "generator" in takes else []
        names += ["operator"] if self.operator else []
        names += ["operator_rank"] if self.operator_rank else []
        return {name: getattr(self, name) for name in names}

    @property
    def how(self) -> str:
        """Method, space, weights and further knobs, in words."""
        words = f"method {self.method}, space {self.space}, weights {_shown(self.weights)}"
        words += " (soft)" if self.rule.soft else ""
        words += "".join(f", {pattern} {_shown(own)}" for pattern, own in self.module_weights.items())
        return words + "".join(f", {name} {value}" for name, value in self.taken.items())

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
        title = f"{len(self.selected)} of {len(self.readings)} modules to merge: gate {self.rule}, {self.how}"
        return title + (proof if self.readings.approximate else "")


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
    open_ones = undecided(plan.readings, plan.rule)
    if open_ones:
        raise PlanError(
            f"{len(open_ones)} modules were measured on a compressed subspace that leaves gate {plan.gate!r} open, the "
            f"first is {open_ones[0]!r} ({plan.readings[open_ones[0]].proof}): give `measure` this gate and its knobs"
        )
