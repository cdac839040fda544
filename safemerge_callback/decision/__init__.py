"""Floor 3: measure, decide, plan, apply, record."""

from .apply import Edit, apply, merged_factors
from .certify import undecided
from .fit import check_safety_adapter
from .gates import GATES, KNOB, KNOBS, Gate, Verdict, as_gate
from .holding import above, held_back, not_rearmed, under_floor, without
from .journal import JOURNAL_FILE, VERSION, Journal, check_entry, merge_entry, read_journal
from .measure import measure
from .own import own_cosines
from .plan import MergePlan, check_merge
from .reading import Reading, Readings
from .strength import attenuated, check_soft, spread

__all__ = [
    "GATES",
    "JOURNAL_FILE",
    "KNOB",
    "KNOBS",
    "VERSION",
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
    "attenuated",
    "check_entry",
    "check_merge",
    "check_safety_adapter",
    "check_soft",
    "held_back",
    "measure",
    "merge_entry",
    "merged_factors",
    "not_rearmed",
    "own_cosines",
    "read_journal",
    "spread",
    "under_floor",
    "undecided",
    "without",
]
