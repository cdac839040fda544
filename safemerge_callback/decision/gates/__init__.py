"""Readings in, one verdict a module out, each with its reason. A gate is a file; its name is its name in YAML.

Importing the folder fills the registry.
"""

# In the order in which messages name them.
from . import (  # noqa: I001
    threshold,
    calibrated,
    reference,
    opposed,
    num_layers,
    quantile,
    gap,
    safety_slope,
    gradient_norm,
    all,
    random,
    watch,
)
from .common import Verdict, excluded
from .registry import GATES, KNOB, Criterion, gate
from .rule import DEFAULT_GATE, KNOBS, Gate, Knobs, as_gate, default_gate, gate_knobs, gate_of, undecided

__all__ = [
    "DEFAULT_GATE",
    "GATES",
    "KNOB",
    "KNOBS",
    "Criterion",
    "Gate",
    "Knobs",
    "Verdict",
    "as_gate",
    "calibrated",
    "all",
    "default_gate",
    "excluded",
    "gap",
    "gradient_norm",
    "gate",
    "gate_knobs",
    "gate_of",
    "num_layers",
    "opposed",
    "quantile",
    "random",
    "reference",
    "safety_slope",
    "threshold",
    "undecided",
    "watch",
]
