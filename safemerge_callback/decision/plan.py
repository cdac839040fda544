"""What will be done, before it is done: a frozen plan that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError, PlanError, nearest
from ..methods import get_method
from .certify import undecided
from .gates import GATES, Verdict, check_gate
from .reading import Readings
from .tables import render

_LARGEST_WEIGHT = 2.0


@dataclass(frozen=True)
class MergePlan:
    """Which modules to merge and how, with the readings and reasons it was decided on.

    `verdicts` has one entry a reading; `weights` are (w_live, w_safety). Make one with `MergePlan.decide`. Raises
    ConfigError for a knob that has no meaning and PlanError for verdicts that do not belong to the readings.
    """

    readings: Readings
    verdicts: Mapping[str, Verdict]
    gate: str
    threshold: float
    num_layers: int | None
    method: str
    space: str
    weights: tuple[float, float]

    def __post_init__(self) -> None:
        check_gate(self.gate, self.threshold, self.num_layers)
        live, safety = check_merge(self.method, self.space, self.weights)
        _check_verdicts(self.readings, self.verdicts)
        _check_decided(self)
        object.__setattr__(self, "weights", (live, safety))
        object.__setattr__(self, "verdicts", MappingProxyType(dict(self.verdicts)))

    @classmethod
    def decide(
        cls,
        readings: Readings,
        *,
        gate: str = "threshold",
        threshold: float = 0.35,
        num_layers: int | None = None,
        method: str = "linear",
        space: str = "delta",
        weights: Sequence[float] = (0.8, 0.2),
    ) -> MergePlan:
        """Ask the gate about every reading. The defaults are the released SafeMERGE's (arXiv:2503.17239).

        Raises ConfigError for an unknown gate, method or space, weights outside [0, 2], and more `num_layers` than
        there are modules.
        """
        check_gate(gate, threshold, num_layers)
        live, safety = check_merge(method, space, weights)
        knobs: dict[str, Any] = {"threshold": threshold, "num_layers": num_layers}
        verdicts = GATES[gate](readings, **{gate: knobs[gate]} if gate in knobs else {})
        if "subspace" in get_method(method).needs:
            verdicts = {name: _projectable(readings, name, verdict) for name, verdict in verdicts.items()}
        return cls(readings, verdicts, gate, threshold, num_layers, method, space, (live, safety))

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
        knob = {"threshold": f" {self.threshold:g}", "num_layers": f" {self.num_layers}"}.get(self.gate, "")
        how = f"method {self.method}, space {self.space}, weights {self.weights[0]:g} / {self.weights[1]:g}"
        proof = f"; {len(self.certified)} certified by interval, {len(self.reread)} re-read exactly"
        title = f"{len(self.selected)} of {len(self.readings)} modules to merge: gate {self.gate}{knob}, {how}"
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
    open_ones = undecided(plan.readings, plan.gate, threshold=plan.threshold, num_layers=plan.num_layers)
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
