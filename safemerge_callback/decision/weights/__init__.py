"""How much: what each update weighs in each module. A rule is a file; importing the folder fills the registry."""

# In the order in which they hold.
from . import asked, by_pattern, focal, learned, soft
from .registry import WEIGHTS, Case, WeightsRule, checked_rules, rules_in_force, weights_knobs, weights_of, weights_rule

__all__ = [
    "WEIGHTS",
    "Case",
    "WeightsRule",
    "asked",
    "by_pattern",
    "checked_rules",
    "focal",
    "learned",
    "rules_in_force",
    "soft",
    "weights_knobs",
    "weights_of",
    "weights_rule",
]
