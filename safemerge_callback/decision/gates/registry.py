"""The one registry of gates: a gate is a file, and describes itself there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, TypedDict, Unpack

from ...io.knobs import Knob
from ..reading import Reading, Readings
from .common import Verdict

Function = Callable[..., dict[str, Verdict]]


def _always(**_knobs: Any) -> bool:
    return True


def never(**_knobs: Any) -> bool:
    """Return False: no verdict of the gate depends on a cosine."""
    return False


@dataclass(frozen=True)
class Criterion:
    """A gate's function, and what it says of itself.

    `function(readings, *, ...)` declares the knobs of `Gate` that it reads, and no others; `open_of` and `asks` are
    given the same ones.

    `knob`: the one that says how much is merged. `knobs`: those declared here, that one where it is none of `Gate`'s.
    `needs`: what must be there, such as `safety_cosines`. `ranked`: whether modules are compared with each other, so
    that one module's verdict needs the readings of all. `limit`: the cosine below which a module is merged, by reading
    and knob; `most`: the largest value of the knob at which anything lies below it. `distance`: of a gate that merges
    below something else than a cosine, how far a module lies above it, by reading and knob. `open_of`: which modules an
    interval leaves open, where that is not whether a limit lies in it; all for a gate that asks cosines and has
    neither. `asks`: whether any verdict depends on a cosine. `merges`: whether it ever merges; `whole`: whether always
    everything. `notes`: fields of `Reading` that a verdict cannot be understood without, for the record.
    """

    name: str
    function: Function
    knob: str | None = None
    knobs: tuple[Knob, ...] = ()
    needs: frozenset[str] = frozenset()
    ranked: bool = False
    limit: Callable[[Reading, float], float] | None = None
    most: float | None = None
    distance: Callable[[Reading, float], float] | None = None
    open_of: Callable[..., Iterable[str]] | None = None
    asks: Callable[..., bool] = _always
    merges: bool = True
    whole: bool = False
    notes: tuple[str, ...] = ()

    def __call__(self, readings: Readings, **knobs: Any) -> dict[str, Verdict]:
        """Ask the gate about every reading; raises as its function does."""
        return self.function(readings, **knobs)

    @cached_property
    def reads(self) -> frozenset[str]:
        """The knobs that the gate reads."""
        return frozenset(p.name for p in signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY)

    @property
    def counts(self) -> bool:
        """Whether the gate's knob is a number of modules, by what its function declares."""
        return self.knob is not None and signature(self.function).parameters[self.knob].annotation in (int, "int")


class GateDescription(TypedDict, total=False):
    """The fields of `Criterion` that say something of the gate."""

    needs: frozenset[str]
    ranked: bool
    limit: Callable[[Reading, float], float] | None
    most: float | None
    distance: Callable[[Reading, float], float] | None
    open_of: Callable[..., Iterable[str]] | None
    asks: Callable[..., bool]
    merges: bool
    whole: bool
    notes: tuple[str, ...]


GATES: dict[str, Criterion] = {}
# Gate -> the knob that says how much it merges.
KNOB: dict[str, str] = {}


def gate(
    *,
    knob: str | Knob | None = None,
    more: tuple[Knob, ...] = (),
    name: str | None = None,
    **about: Unpack[GateDescription],
) -> Callable[[Function], Function]:
    """Enter a gate under `name`, its function's own where that is None; the rest are the fields of `Criterion`.

    `knob`: the name of one of `Gate`'s, or a `Knob` of the gate's own, whose value is a number. `more`: further knobs
    of its own.
    """
    knobs = (*((knob,) if isinstance(knob, Knob) else ()), *more)
    main = knob.name if isinstance(knob, Knob) else knob

    def enter(function: Function) -> Function:
        entry = Criterion(name or function.__name__, function, main, knobs, **about)
        GATES[entry.name] = entry
        if main is not None:
            KNOB[entry.name] = main
        return function

    return enter
