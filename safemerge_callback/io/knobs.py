"""A knob as whoever reads it declares it: its name, what it is without a word, what it may be, what it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, nearest, shown


@dataclass(frozen=True)
class Knob:
    """A knob of a merge method, a gate or a weights rule, declared in the file of the one that reads it.

    `check(value, beside)` returns the value in its own type, which it takes as well, and raises ConfigError, which
    prints the value, what is allowed and what to do; `beside` holds what was checked before it, and the name of the one
    that reads it, for a weights rule `how`. `default` is what stands where nothing is given, checked like the rest.
    `idle` ends the sentence on one that is given to a reader that has no use for it. `needs`: what one of its values
    needs to be there, beyond what its reader needs.
    """

    name: str
    help: str
    check: Callable[[Any, Mapping[str, Any]], Any]
    default: Any = None
    idle: str = "which {kind} {reader!r} does not read"
    needs: Mapping[Any, frozenset[str]] = field(default_factory=dict)


def checked(knobs: tuple[Knob, ...], values: Mapping[str, Any], **beside: Any) -> dict[str, Any]:
    """Return the value of every one of `knobs`, in their order: that of `values`, or its default; raises as they do."""
    settled: dict[str, Any] = {}
    for knob in knobs:
        settled[knob.name] = knob.check(values.get(knob.name, knob.default), {**beside, **settled})
    return settled


def named_values(values: Any) -> Mapping[str, Any]:
    """Return `values`, a mapping of knobs' names to values; ConfigError for anything else."""
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"knobs is {shown(values)}: map names of knobs to values, or leave it out")
    return values


def refuse_idle(knob: Knob, value: Any, kind: str, reader: str, able: list[str]) -> None:
    """Raise ConfigError where `value` says something and `reader`, a `kind` of thing, does not read it.

    `able` are the names of those that do.
    """
    if knob.default is not None:
        # One that has a meaning of its own is told to all of them: what it cannot be is told first.
        value = knob.check(value, {kind: able[0]})
    if value != knob.default:
        others = repr(able[0]) if len(able) == 1 else f"one of {able}"
        idle = knob.idle.format(kind=kind, reader=reader)
        raise ConfigError(f"{knob.name} is {shown(value)}, {idle}: leave it out, or choose {others}")


def unknown_knob(name: str, known: tuple[str, ...], what: str) -> ConfigError:
    """Return the error for a knob that nothing reads: `what` it would be one of, and the nearest that there is."""
    return ConfigError(f"knob {name!r} of {what} is unknown{nearest(name, known, then=f'choose among {known}')}")
