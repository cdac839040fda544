"""Floor 3: measure, decide, plan, apply, record."""

from .apply import Edit, apply, merged_factors
from .certify import undecided
from .fit import check_safety_adapter
from .gates import GATES, Verdict, check_gate
from .journal import JOURNAL_FILE, VERSION, Journal, check_entry, merge_entry, read_journal
from .measure import measure
from .plan import MergePlan, check_merge
from .reading import Reading, Readings

__all__ = [
    "GATES",
    "JOURNAL_FILE",
    "VERSION",
    "Edit",
    "Journal",
    "MergePlan",
    "Reading",
    "Readings",
    "Verdict",
    "apply",
    "check_entry",
    "check_gate",
    "check_merge",
    "check_safety_adapter",
    "measure",
    "merge_entry",
    "merged_factors",
    "read_journal",
    "undecided",
]
