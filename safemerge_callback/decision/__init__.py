"""Floor 4: measure, decide, plan, apply."""

from typing import TYPE_CHECKING

from ..io.renamed import renamed
from .apply import Edit, agreed_factors, apply, merged_factors
from .certify import undecided
from .empty import nothing_selected
from .fit import check_safety_adapter
from .gates import DEFAULT_GATE, GATES, KNOB, KNOBS, Gate, Verdict, as_gate, default_gate, gate_of
from .measure import measure
from .moved import BAND, Band, mean_moved
from .operators import check_operator
from .plan import MergePlan
from .reading import Reading, Readings
from .safety_cosines import own_cosines
from .strength import attenuated, check_soft, check_spread, share_left, spread
from .vetoes import above, held_back, not_rearmed, under_floor, without
from .weights import DEFAULT_WEIGHTS, check_merge, check_module_weights, merge_weights, method_of

__all__ = [
    "BAND",
    "DEFAULT_WEIGHTS",
    "DEFAULT_GATE",
    "GATES",
    "KNOB",
    "KNOBS",
    "Band",
    "Edit",
    "Gate",
    "MergePlan",
    "Reading",
    "Readings",
    "Verdict",
    "above",
    "agreed_factors",
    "apply",
    "as_gate",
    "default_gate",
    "gate_of",
    "attenuated",
    "check_merge",
    "check_module_weights",
    "check_operator",
    "check_safety_adapter",
    "check_soft",
    "check_spread",
    "held_back",
    "mean_moved",
    "measure",
    "merge_weights",
    "merged_factors",
    "method_of",
    "not_rearmed",
    "nothing_selected",
    "own_cosines",
    "share_left",
    "spread",
    "under_floor",
    "undecided",
    "without",
]

# Hidden from type checkers, to which a module with such a function has every name.
if not TYPE_CHECKING:
    __getattr__ = renamed(
        __name__,
        {
            "AVERAGE_FILE": "safemerge_callback.corrections.average",
            "Average": "safemerge_callback.corrections.average",
            "Journal": "safemerge_callback.record",
            "check_entry": "safemerge_callback.record",
            "merge_entry": "safemerge_callback.record",
            "read_journal": "safemerge_callback.record",
        },
    )
