"""Floor 4: measure, decide, plan, apply."""

from typing import TYPE_CHECKING

from ..io.renamed import renamed
from .apply import Edit, agreed_factors, apply, merged_factors
from .choices import Choices, choose
from .fit import check_safety_adapter
from .gates import DEFAULT_GATE, GATES, KNOB, KNOBS, Gate, Verdict, as_gate, default_gate, gate_of, undecided
from .measure import cosines_needed, measure, own_cosines
from .needs import needs_of
from .plan import MergePlan, nothing_selected
from .reading import BAND, Band, Reading, Readings, mean_moved
from .vetoes import above, held_back, not_rearmed, share_left, under_floor, without

__all__ = [
    "BAND",
    "DEFAULT_GATE",
    "GATES",
    "KNOB",
    "KNOBS",
    "Band",
    "Choices",
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
    "check_safety_adapter",
    "choose",
    "cosines_needed",
    "held_back",
    "mean_moved",
    "measure",
    "merged_factors",
    "needs_of",
    "not_rearmed",
    "nothing_selected",
    "own_cosines",
    "share_left",
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
            "JOURNAL_FILE": "safemerge_callback.record",
            "PAGE_FILE": "safemerge_callback.record",
            "VERSION": "safemerge_callback.record",
            "numbered_entries": "safemerge_callback.record",
            "parse_lines": "safemerge_callback.record",
            "require_journal_file": "safemerge_callback.record",
            "tell_torn": "safemerge_callback.record",
            "DEFAULT_WEIGHTS": "safemerge_callback.methods",
            "Journal": "safemerge_callback.record",
            "attenuated": "safemerge_callback.decision.weights.soft",
            "check_entry": "safemerge_callback.record",
            "check_merge": "safemerge_callback.methods",
            "check_module_weights": "safemerge_callback.decision.weights.by_pattern",
            "merge_entry": "safemerge_callback.record",
            "merge_weights": "safemerge_callback.methods",
            "method_of": "safemerge_callback.methods",
            "read_journal": "safemerge_callback.record",
            "spread": "safemerge_callback.decision.weights.spread",
        },
    )
