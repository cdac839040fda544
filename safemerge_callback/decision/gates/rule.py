"""A gate with its knobs: checked when made, then asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from ...errors import ConfigError, nearest
from ...io.choices import one_of
from ..reading import Reading, Readings
from . import calibrated, checks, constant, gap, num_layers, opposed, quantile, random, reference, threshold
from .common import Verdict, excluded

GATES: dict[str, Callable[..., dict[str, Verdict]]] = {
    "threshold": threshold.threshold,
    "calibrated": calibrated.calibrated,
    "reference": reference.reference,
    "opposed": opposed.opposed,
    "num_layers": num_layers.num_layers,
    "quantile": quantile.quantile,
    "gap": gap.gap,
    "all": constant.all_modules,
    "random": random.random,
    "watch": constant.watch,
}
# What merges where nothing is said: modules of low cosine kept no more refusals than as many at random.
DEFAULT_GATE = "all"
# The knob that says how much a gate merges.
KNOB = {
    "threshold": "threshold",
    "calibrated": "z_threshold",
    "reference": "reference_fraction",
    "opposed": "z_threshold",
    "num_layers": "num_layers",
    "quantile": "quantile",
}
# Gates that merge below a cosine of each module's own, and that cosine by reading and knob.
LIMITS: dict[str, Callable[[Reading, float], float]] = {
    "threshold": threshold.limit,
    "calibrated": calibrated.limit,
    "reference": reference.limit,
}
# Gates that merge below something else than a cosine, and how far a module lies above it.
DISTANCES: dict[str, Callable[[Reading, float], float]] = {"opposed": opposed.distance}
# Gates that compare modules with each other, so that one module's verdict needs the readings of all.
RANKED = ("num_layers", "quantile", "gap")
# Knobs without a default that means anything, and the gates that read them.
_READ_BY = {"num_layers": ("num_layers", "random"), "quantile": ("quantile",)}


class Knobs(TypedDict, total=False):
    """The knobs of `Gate`, by name."""

    threshold: float
    num_layers: int | None
    z_threshold: float
    reference_fraction: float
    quantile: float | None
    seed: int
    step: int
    rearm: float | None
    soft: bool


@dataclass(frozen=True)
class Gate:
    """A gate's name and every knob; each gate reads its own. ConfigError for a name or a knob that cannot be.

    `threshold`, `z_threshold`, `reference_fraction`, `num_layers`, `quantile`: as the gate of that name (`calibrated`
    and `opposed`, `reference`) has it. `seed` and `step`: what gate `random` draws by. `rearm`: how far above the gate,
    in the units of its knob, a merged module counts as recovered; None where nobody asks. `soft`: weights that depend
    on how far below the gate a module lies, so that its cosine itself must be exact. The defaults of `z_threshold` and
    `reference_fraction` are ours: -2 is undercut by 2 of 100 unrelated updates, and neither was tuned.
    """

    name: str = "threshold"
    threshold: float = 0.35
    num_layers: int | None = None
    z_threshold: float = -2.0
    reference_fraction: float = 0.5
    quantile: float | None = None
    seed: int = 0
    step: int = 0
    rearm: float | None = None
    soft: bool = False

    def __post_init__(self) -> None:
        one_of(self.name, GATES, "gate")
        checks.check_threshold(self.threshold)
        checks.check_z_threshold(self.z_threshold)
        checks.check_reference_fraction(self.reference_fraction)
        checks.check_count_of("seed", self.seed)
        checks.check_count_of("step", self.step)
        checks.check_rearm(self.rearm)
        self._check_unread()
        self._check_rearm()
        if not isinstance(self.soft, bool) or (self.soft and self.name not in LIMITS):
            raise ConfigError(
                f"soft={self.soft!r} with gate {self.name!r}: weights grow with the distance below a cosine, so give "
                f"true with one of {sorted(LIMITS)}, or false"
            )

    def _check_unread(self) -> None:
        for knob, gates in _READ_BY.items():
            value = getattr(self, knob)
            if self.name in gates and (value is not None or knob == self.name):
                {"num_layers": checks.check_num_layers, "quantile": checks.check_quantile}[knob](value)
            elif value is not None:
                readers = " and ".join(repr(gate) for gate in gates)
                raise ConfigError(
                    f"{knob}={value!r} is read by gate {readers} only, and gate is {self.name!r}: drop one"
                )

    def _check_rearm(self) -> None:
        if not self.rearm and (self.rearm is None or self.name in (*LIMITS, *RANKED)):
            return
        if self.name not in LIMITS:
            allowed = "only 0 has a meaning" if self.name in RANKED else "leave it out"
            raise ConfigError(f"rearm={self.rearm} with gate {self.name!r}, which no cosine lies above: {allowed}")
        if self.name == "threshold" and self.threshold + (self.rearm or 0) > 1:
            raise ConfigError(
                f"rearm={self.rearm} above threshold={self.threshold:g} is a cosine over 1, which none is: lower one"
            )

    def verdicts(self, readings: Readings) -> dict[str, Verdict]:
        """Ask the gate about every reading; raises as the gate does."""
        read = {"random": ("threshold", "num_layers", "seed", "step")}.get(self.name, (KNOB.get(self.name),))
        return GATES[self.name](readings, **{knob: getattr(self, knob) for knob in read if knob})

    def limit(self, reading: Reading, margin: float = 0.0) -> float | None:
        """Return the cosine below which this module is merged, the knob raised by `margin`.

        None for a gate that has no such cosine, and for a module that no cosine decides. Raises as the gate does.
        """
        if self.name not in LIMITS or excluded(reading):
            return None
        return LIMITS[self.name](reading, getattr(self, KNOB[self.name]) + margin)

    def distance(self, reading: Reading) -> float:
        """Return how far the module lies above what the gate merges below; for a gate without such a limit its cosine.

        To be compared within one gate only. Not for modules that no cosine decides.
        """
        if self.name in DISTANCES:
            return DISTANCES[self.name](reading, getattr(self, KNOB[self.name]))
        return reading.cosine - (self.limit(reading) or 0.0)

    @property
    def limits(self) -> bool:
        """Whether the gate merges below a cosine of each module's own."""
        return self.name in LIMITS

    @property
    def asks_cosines(self) -> bool:
        """Whether any verdict depends on a cosine."""
        return self.name not in ("all", "watch") and not (self.name == "random" and self.num_layers is not None)

    @property
    def ranked(self) -> bool:
        """Whether a module is open or not (`undecided`) only by the readings of all modules."""
        return self.name in RANKED

    @property
    def knob(self) -> float | None:
        """The knob that says how much is merged; None for a gate that has none."""
        value: float | None = getattr(self, KNOB[self.name]) if self.name in KNOB else None
        return value

    def __str__(self) -> str:
        return self.name if self.knob is None else f"{self.name} {self.knob:g}"


KNOBS = tuple(field.name for field in fields(Gate) if field.name != "name")


def gate_of(knobs: Mapping[str, Any], otherwise: str) -> str:
    """Return the gate whose own knob is given, not None; of several not `threshold`, of none `otherwise`."""
    names = [*(name for name in KNOB if name != "threshold"), "threshold"]
    return next((name for name in names if knobs.get(KNOB[name]) is not None), otherwise)


def default_gate(knobs: Mapping[str, Any]) -> str:
    """Return the gate that stands where none is named: the one whose own knob is given, else `all`.

    Soft weights and re-arming are by a cosine that the gate merges below, so they ask for `threshold`.
    """
    by_limit = knobs.get("soft") or knobs.get("rearm") is not None
    return gate_of(knobs, "threshold" if by_limit else DEFAULT_GATE)


def as_gate(gate: str | Gate | None, knobs: Mapping[str, Any]) -> Gate:
    """Return `gate`, or `default_gate`, with these knobs.

    ConfigError for a `Gate` that already has its own, or a knob that is none.
    """
    if isinstance(gate, Gate):
        if knobs:
            raise ConfigError(f"knobs {sorted(knobs)} were given beside a Gate: make the Gate with them")
        return gate
    unknown = sorted(set(knobs) - set(KNOBS))
    if unknown:
        raise ConfigError(
            f"knob {unknown[0]!r} of a gate is unknown{nearest(unknown[0], KNOBS, then=f'choose among {KNOBS}')}"
        )
    return Gate(default_gate(knobs) if gate is None else gate, **knobs)
