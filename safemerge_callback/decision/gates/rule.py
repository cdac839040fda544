"""A gate with its knobs: checked when made, then asked; and which decisions intervals leave open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, Unpack

from ...errors import ConfigError, shown
from ...io.choices import one_of
from ...io.knobs import checked, named_values, unknown_knob
from ..reading import Reading, Readings
from . import checks
from .common import Verdict, excluded, straddles
from .registry import GATES, KNOB, Criterion

# What merges where nothing is said: modules of low cosine kept no more refusals than as many at random.
DEFAULT_GATE = "all"
# What merges where only something about a cosine is said.
COSINE_GATE = "threshold"
# Knobs without a default that means anything: what they may be where a gate reads them.
_OPTIONAL: Mapping[str, Callable[[Any], None]] = {
    "num_layers": checks.check_num_layers,
    "quantile": checks.check_quantile,
}


class Knobs(TypedDict, total=False):
    """The knobs of `Gate` and of the gates here, by name."""

    threshold: float
    num_layers: int | None
    z_threshold: float
    reference_fraction: float
    quantile: float | None
    seed: int
    step: int
    rearm: float | None
    soft: bool
    slope_share: float
    gradient_share: float
    per_task_slope: bool


@dataclass(frozen=True)
class Gate:
    """A gate's name and every knob; each gate reads its own. ConfigError for a name or a knob that cannot be.

    `threshold`, `z_threshold`, `reference_fraction`, `num_layers`, `quantile`: as the gate of that name (`calibrated`
    and `opposed`, `reference`) has it. `seed` and `step`: what gate `random` draws by. `rearm`: how far above the gate,
    in the units of its knob, a merged module counts as recovered; None where nobody asks. `soft`: weights that depend
    on how far below the gate a module lies, so that its cosine itself must be exact. `knobs`: those that only the gate
    itself has declared. The defaults of `z_threshold` and `reference_fraction` are ours: -2 is undercut by 2 of 100
    unrelated updates, and neither was tuned.
    """

    name: str = COSINE_GATE
    threshold: float = 0.35
    num_layers: int | None = None
    z_threshold: float = -2.0
    reference_fraction: float = 0.5
    quantile: float | None = None
    seed: int = 0
    step: int = 0
    rearm: float | None = None
    soft: bool = False
    knobs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        one_of(self.name, GATES, "gate")
        checks.check_threshold(self.threshold)
        checks.check_z_threshold(self.z_threshold)
        checks.check_reference_fraction(self.reference_fraction)
        checks.check_count_of("seed", self.seed)
        checks.check_count_of("step", self.step)
        checks.check_rearm(self.rearm)
        self._check_unread()
        object.__setattr__(self, "knobs", checked(self.criterion.knobs, self.knobs, gate=self.name))
        self._check_rearm()
        if not isinstance(self.soft, bool) or (self.soft and not self.limits):
            able = sorted(name for name, other in GATES.items() if other.limit)
            raise ConfigError(
                f"soft={shown(self.soft)} with gate {self.name!r}: weights grow with the distance below a cosine, so "
                f"give true with one of {able}, or false"
            )

    def _check_unread(self) -> None:
        for knob, check in _OPTIONAL.items():
            value, readers = getattr(self, knob), [name for name, other in GATES.items() if knob in other.reads]
            if self.name in readers and (value is not None or knob == self.criterion.knob):
                check(value)
            elif value is not None:
                self._refuse(knob, value, readers)
        declarations = {knob.name for knob in self.criterion.knobs}
        for knob, value in named_values(self.knobs).items():
            if knob not in declarations:
                self._refuse(knob, value, [name for name, other in GATES.items() if knob in other.reads])

    def _refuse(self, knob: str, value: Any, readers: list[str]) -> None:
        if not readers:
            raise unknown_knob(knob, gate_knobs(), "a gate")
        gates = " and ".join(repr(gate) for gate in readers)
        raise ConfigError(f"{knob}={shown(value)} is read by gate {gates} only, and gate is {self.name!r}: drop one")

    def _check_rearm(self) -> None:
        if not self.rearm and (self.rearm is None or self.limits or self.ranked):
            return
        if not self.limits:
            allowed = "only 0 has a meaning" if self.ranked else "leave it out"
            raise ConfigError(f"rearm={self.rearm} with gate {self.name!r}, which no cosine lies above: {allowed}")
        most, knob = self.criterion.most, self.knob
        if most is not None and knob is not None and knob + (self.rearm or 0) > most:
            raise ConfigError(
                f"rearm={self.rearm} above {self.criterion.knob}={knob:g} is a cosine over {most:g}, which none is: "
                "lower one"
            )

    @property
    def criterion(self) -> Criterion:
        """What the gate says of itself."""
        return GATES[self.name]

    @property
    def needs(self) -> frozenset[str]:
        """What must be there: what the gate needs, and the values of its knobs beyond that."""
        more = (knob.needs.get(self.knobs[knob.name], frozenset()) for knob in self.criterion.knobs)
        return self.criterion.needs.union(*more)

    @property
    def reads(self) -> dict[str, Any]:
        """The knobs that this gate reads, and their values."""
        return {name: self._value(name) for name in self.criterion.reads}

    def _value(self, knob: str) -> Any:
        return self.knobs[knob] if knob in self.knobs else getattr(self, knob)

    def verdicts(self, readings: Readings) -> dict[str, Verdict]:
        """Ask the gate about every reading; raises as the gate does."""
        return self.criterion(readings, **self.reads)

    def limit(self, reading: Reading, margin: float = 0.0) -> float | None:
        """Return the cosine below which this module is merged, the knob raised by `margin`.

        None for a gate that has no such cosine, and for a module that no cosine decides. Raises as the gate does.
        """
        if self.criterion.limit is None or excluded(reading):
            return None
        return self.criterion.limit(reading, (self.knob or 0.0) + margin)

    def distance(self, reading: Reading) -> float:
        """Return how far the module lies above what the gate merges below; for a gate without such a limit its cosine.

        To be compared within one gate only. Not for modules that no cosine decides.
        """
        if self.criterion.distance is not None:
            return self.criterion.distance(reading, self.knob or 0.0)
        return reading.cosine - (self.limit(reading) or 0.0)

    def unproven(self, readings: Readings) -> frozenset[str]:
        """Return the modules that intervals leave open, those of exact readings too; see `undecided`."""
        if self.criterion.open_of is not None:
            return frozenset(self.criterion.open_of(readings, **self.reads))
        if not self.limits and self.asks_cosines:
            # Nobody says what an interval leaves open: all of it.
            return frozenset(readings)
        return frozenset(name for name, reading in readings.items() if self._open(reading))

    def _open(self, reading: Reading) -> bool:
        limit = self.limit(reading)
        if limit is None:
            return False
        raised = self.limit(reading, self.rearm) if self.rearm else None
        return straddles(reading, limit, exactly=self.soft) or (raised is not None and straddles(reading, raised))

    @property
    def limits(self) -> bool:
        """Whether the gate merges below a cosine of each module's own."""
        return self.criterion.limit is not None

    @property
    def asks_cosines(self) -> bool:
        """Whether any verdict depends on a cosine."""
        return self.criterion.asks(**self.reads)

    @property
    def merges(self) -> bool:
        """Whether it may merge anything at all."""
        return self.criterion.merges

    @property
    def ranked(self) -> bool:
        """Whether a module is open or not (`undecided`) only by the readings of all modules."""
        return self.criterion.ranked

    @property
    def knob(self) -> float | None:
        """The knob that says how much is merged; None for a gate that has none."""
        value: float | None = None if self.criterion.knob is None else self._value(self.criterion.knob)
        return value

    def __str__(self) -> str:
        return self.name if self.knob is None else f"{self.name} {self.knob:g}"


KNOBS = tuple(entry.name for entry in fields(Gate) if entry.name not in ("name", "knobs"))


def gate_of(knobs: Mapping[str, Any], otherwise: str) -> str:
    """Return the gate whose own knob is given, not None; of several not `threshold`, of none `otherwise`."""
    names = [*(name for name in KNOB if name != COSINE_GATE), COSINE_GATE]
    return next((name for name in names if knobs.get(KNOB[name]) is not None), otherwise)


def default_gate(knobs: Mapping[str, Any]) -> str:
    """Return the gate that stands where none is named: the one whose own knob is given, else `all`.

    Soft weights and re-arming are by a cosine that the gate merges below, so they ask for `threshold`.
    """
    by_limit = knobs.get("soft") or knobs.get("rearm") is not None
    return gate_of(knobs, COSINE_GATE if by_limit else DEFAULT_GATE)


def gate_knobs() -> tuple[str, ...]:
    """Return the names of all knobs that a gate may be given: `Gate`'s, and those that gates have declared."""
    return (*KNOBS, *(knob.name for other in GATES.values() for knob in other.knobs))


def as_gate(gate: str | Gate | None, knobs: Mapping[str, Any]) -> Gate:
    """Return `gate`, or `default_gate`, with these knobs.

    ConfigError for a `Gate` that already has its own, or a knob that is none.
    """
    if isinstance(gate, Gate):
        if knobs:
            raise ConfigError(f"knobs {sorted(knobs)} were given beside a Gate: make the Gate with them")
        return gate
    allowed = gate_knobs()
    unknown = sorted(set(knobs) - set(allowed))
    if unknown:
        raise unknown_knob(unknown[0], allowed, "a gate")
    extras = {name: value for name, value in knobs.items() if name not in KNOBS}
    rest = {name: value for name, value in knobs.items() if name in KNOBS}
    return Gate(default_gate(knobs) if gate is None else gate, **rest, knobs=extras)


def undecided(readings: Readings, gate: str | Gate, **knobs: Unpack[Knobs]) -> list[str]:
    """Return the modules that must be read exactly before `gate` may decide, in the order of the readings.

    Once these are exact, the gate's decision on every module is that of exact readings alone, and so is, with `rearm`,
    whether it lies that far above the gate, and, with `soft`, its weights. None are returned where the readings are
    exact, or where the gate asks no cosine (`all`, `watch`, `random` with `num_layers`). Raises ConfigError for knobs
    that the gate cannot use, and as the gate does for readings that lack what it needs.
    """
    unproven = as_gate(gate, knobs).unproven(readings)
    return [name for name, reading in readings.items() if reading.interval and name in unproven]
