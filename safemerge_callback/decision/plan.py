"""What will be done, before it is done: a frozen plan that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Unpack

from ..errors import ConfigError, PlanError, nearest
from ..methods import check_density, check_majority_sign, get_method
from .certify import undecided
from .gates import Gate, Knobs, Verdict, as_gate
from .reading import Readings
from .strength import attenuated, check_soft
from .tables import render

_LARGEST_WEIGHT = 2.0


@dataclass(frozen=True)
class MergePlan:
    """Which modules to merge and how, with the readings and reasons it was decided on.

    `verdicts` has one entry a reading; `weights` are (w_live, w_safety), with a soft `rule` those at a cosine of 0.
    `density` and `majority_sign_method` are for the methods that read them; the rule's seed and step are, with a
    module's name, what random masks are drawn from. Make one with `MergePlan.decide`. Raises ConfigError for a knob
    that has no meaning and PlanError for verdicts that do not belong to the readings.
    """

    readings: Readings
    verdicts: Mapping[str, Verdict]
    rule: Gate
    method: str
    space: str
    weights: tuple[float, float]
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        live, safety = check_merge(self.method, self.space, self.weights)
        check_soft(self.rule.soft, self.method, self.space)
        object.__setattr__(self, "density", check_density(self.method, self.density))
        check_majority_sign(self.method, self.majority_sign_method)
        _check_verdicts(self.readings, self.verdicts)
        _check_decided(self)
        object.__setattr__(self, "weights", (live, safety))
        object.__setattr__(self, "verdicts", MappingProxyType(dict(self.verdicts)))

    @classmethod
    def decide(
        cls,
        readings: Readings,
        *,
        gate: str | Gate = "threshold",
        method: str = "linear",
        space: str = "delta",
        weights: Sequence[float] = (0.8, 0.2),
        density: float | None = None,
        majority_sign_method: str = "total",
        **knobs: Unpack[Knobs],
    ) -> MergePlan:
        """Ask the gate about every reading. The defaults are the released SafeMERGE's (arXiv:2503.17239).

        `gate`: its name with its knobs (those of `Gate`: threshold, num_layers, ...), or a `Gate`. Raises ConfigError
        for an unknown gate, knob, method or space, weights outside [0, 2], more `num_layers` than there are modules,
        and a `density` that is outside (0, 1], missing, or given to a method that prunes nothing; as the gate does for
        readings that lack what it needs.
        """
        rule = as_gate(gate, knobs)
        live, safety = check_merge(method, space, weights)
        share, sign = check_density(method, density), check_majority_sign(method, majority_sign_method)
        verdicts = rule.verdicts(readings)
        if "subspace" in get_method(method).needs:
            verdicts = {name: _projectable(readings, name, verdict) for name, verdict in verdicts.items()}
        return cls(readings, verdicts, rule, method, space, (live, safety), share, sign)

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

    def weights_of(self, name: str) -> tuple[float, float]:
        """Return (w_live, w_safety) of a module: `weights`, or for a soft rule less of a change, by its cosine."""
        reading = self.readings[name]
        limit = self.rule.limit(reading) if self.rule.soft else None
        return self.weights if limit is None else attenuated(self.weights, reading.cosine, limit)

    def task_weight_of(self, name: str) -> float:
        """Return the share of a module's own update that this merge leaves; 1.0 for a method that takes none away."""
        return self.weights_of(name)[0] if "safety_adapter" in get_method(self.method).needs else 1.0

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
        names = [name for name in ("density", "majority_sign_method") if name in takes]
        return {name: getattr(self, name) for name in (*names, *(["seed"] if "generator" in takes else []))}

    def __str__(self) -> str:
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
        return render(self._title(), columns, rows, right=("cosine", "known as", "null"))

    def _title(self) -> str:
        how = f"method {self.method}, space {self.space}, weights {self.weights[0]:g} / {self.weights[1]:g}"
        how += " (soft)" if self.rule.soft else ""
        how += "".join(f", {name} {value}" for name, value in self.taken.items())
        proof = f"; {len(self.certified)} certified by interval, {len(self.reread)} re-read exactly"
        title = f"{len(self.selected)} of {len(self.readings)} modules to merge: gate {self.rule}, {how}"
        return title + (proof if self.readings.approximate else "")


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


def check_merge(method: str, space: str, weights: Sequence[float]) -> tuple[float, float]:
    """Return `weights` as two floats; ConfigError for an unknown method or space, or weights outside [0, 2]."""
    spaces = get_method(method).spaces
    if space not in spaces:
        raise ConfigError(
            f"space {space!r} is not one that method {method!r} works in: choose one of {sorted(spaces)}"
            f"{nearest(str(space), spaces)}"
        )
    return _two_weights(weights)


def _two_weights(weights: Any) -> tuple[float, float]:
    allowed = f"give two finite numbers (w_live, w_safety), each from 0 to {_LARGEST_WEIGHT:g}, not both 0"
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != 2:
        raise ConfigError(f"weights={weights!r}: {allowed}")
    numbers = [w for w in weights if isinstance(w, int | float) and not isinstance(w, bool)]
    inside = len(numbers) == 2 and all(0 <= w <= _LARGEST_WEIGHT for w in numbers)
    if not inside or not any(numbers):
        raise ConfigError(f"weights={weights!r}: {allowed}")
    return float(numbers[0]), float(numbers[1])
