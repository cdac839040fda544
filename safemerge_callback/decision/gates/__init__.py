"""Readings in, one verdict a module out, each with its reason. A gate is a file; its name is its name in YAML."""

from .common import Verdict, excluded
from .rule import GATES, KNOB, KNOBS, LIMITS, RANKED, Gate, Knobs, as_gate, gate_of

__all__ = ["GATES", "KNOB", "KNOBS", "LIMITS", "RANKED", "Gate", "Knobs", "Verdict", "as_gate", "excluded", "gate_of"]
