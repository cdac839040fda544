"""Readings in, one verdict a module out, each with its reason. A gate is a file; its name is its name in YAML."""

from .common import Verdict, excluded
from .rule import DEFAULT_GATE, GATES, KNOB, KNOBS, LIMITS, RANKED, Gate, Knobs, as_gate, default_gate, gate_of

__all__ = [
    "DEFAULT_GATE",
    "GATES",
    "KNOB",
    "KNOBS",
    "LIMITS",
    "RANKED",
    "Gate",
    "Knobs",
    "Verdict",
    "as_gate",
    "default_gate",
    "excluded",
    "gate_of",
]
