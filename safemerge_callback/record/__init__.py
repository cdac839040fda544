"""Floor 6: what a run leaves in writing: its journal, its metrics, how far it is, its model card."""

from .entries import change_entry, check_entry, merge_entry
from .journal import (
    JOURNAL_FILE,
    PAGE_FILE,
    VERSION,
    Journal,
    numbered_entries,
    parse_lines,
    read_journal,
    require_journal_file,
    tell_torn,
)
from .metrics import METRICS

__all__ = [
    "METRICS",
    "JOURNAL_FILE",
    "Journal",
    "PAGE_FILE",
    "VERSION",
    "change_entry",
    "check_entry",
    "merge_entry",
    "numbered_entries",
    "parse_lines",
    "read_journal",
    "require_journal_file",
    "tell_torn",
]
