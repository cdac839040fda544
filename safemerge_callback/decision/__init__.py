"""Floor 3: measure, decide, plan, apply, record."""

from .apply import Edit, apply, merged_factors
from .average import AVERAGE_FILE, Average
from .certify import undecided
from .empty import nothing_selected
from .fit import check_safety_adapter
from .gates import DEFAULT_GATE, GATES, KNOB, KNOBS, Gate, Verdict, as_gate, default_gate, gate_of
from .holding import above, held_back, not_rearmed, under_floor, without
from .journal import (
    JOURNAL_FILE,
    PAGE_FILE,
    VERSION,
    Journal,
    check_entry,
    merge_entry,
    numbered_entries,
    parse_lines,
    read_journal,
    require_journal_file,
    tell_torn,
)
from .measure import measure
from .moved import BAND, Band, mean_moved
from .operators import check_operator
from .own import own_cosines
from .plan import MergePlan
from .reading import Reading, Readings
from .strength import attenuated, check_soft, check_spread, share_left, spread
from .weights import DEFAULT_WEIGHTS, check_merge, check_module_weights, merge_weights, method_of

__all__ = [
    "AVERAGE_FILE",
    "BAND",
    "DEFAULT_WEIGHTS",
    "DEFAULT_GATE",
    "GATES",
    "JOURNAL_FILE",
    "PAGE_FILE",
    "KNOB",
    "KNOBS",
    "VERSION",
    "Average",
    "Band",
    "Edit",
    "Gate",
    "Journal",
    "MergePlan",
    "Reading",
    "Readings",
    "Verdict",
    "above",
    "apply",
    "as_gate",
    "default_gate",
    "gate_of",
    "attenuated",
    "check_entry",
    "check_merge",
    "check_module_weights",
    "check_operator",
    "check_safety_adapter",
    "check_soft",
    "check_spread",
    "held_back",
    "mean_moved",
    "measure",
    "merge_entry",
    "merge_weights",
    "merged_factors",
    "method_of",
    "not_rearmed",
    "nothing_selected",
    "own_cosines",
    "numbered_entries",
    "parse_lines",
    "read_journal",
    "require_journal_file",
    "share_left",
    "tell_torn",
    "spread",
    "under_floor",
    "undecided",
    "without",
]
