"""Which, how and how much of the settings by name: each knob goes to the one that has declared it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...decision import GATES, Gate, as_gate
from ...decision.gates import gate_knobs
from ...decision.weights import weights_knobs
from ...io.choices import one_of
from ...methods import How, as_how
from ...methods.how import how_knobs


def gate_at(settings: Mapping[str, Any], step: int = 0) -> Gate:
    """Return the gate of these settings with its knobs, as it decides at optimizer step `step`."""
    return as_gate(one_of(settings["gate"], GATES, "gate"), {**_named(settings, gate_knobs()), "step": step})


def how_of(settings: Mapping[str, Any], adapters: int | None = None) -> How:
    """Return the method of these settings with its knobs; `adapters` as `as_how` has it."""
    return as_how(settings["method"], _named(settings, how_knobs()), adapters)


def rules_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs of the weights rules."""
    return _named(settings, weights_knobs())


def declared_knobs(settings: Iterable[str]) -> tuple[str, ...]:
    """Return the knobs that a method, a gate or a weights rule has declared and that are none of these settings."""
    return tuple(name for name in (*gate_knobs(), *how_knobs(), *weights_knobs()) if name not in {*settings, "step"})


def _named(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those that are set: by themselves, or in `knobs`."""
    values = {**settings, **(settings["knobs"] or {})}
    return {name: values[name] for name in names if name in values}
