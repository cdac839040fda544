"""Every kind of line that a journal holds: what writes it and what reads it stand together.

`run` has what a run says of itself (start, error, best, end), `checks` what was measured and merged (check, merge,
rollback, undo), `corrections` what else was done (change, gradient), `probes` the probe's and its rules'
(probe, trigger, stop); `readers` knows which reads which.
docs/journal.md tells of every key.
"""

from .checks import check_entry, merge_entry, rollback_entry, undo_entry, undo_noted
from .corrections import change_entry, gradient_entry
from .probes import probe_entry, stop_entry, trigger_entry
from .readers import READERS, add_entry, read_history
from .run import Sources, best_entry, end_entry, error_entry, start_entry, versions_of

__all__ = [
    "READERS",
    "Sources",
    "add_entry",
    "best_entry",
    "change_entry",
    "check_entry",
    "end_entry",
    "error_entry",
    "gradient_entry",
    "merge_entry",
    "probe_entry",
    "read_history",
    "rollback_entry",
    "start_entry",
    "stop_entry",
    "trigger_entry",
    "undo_entry",
    "undo_noted",
    "versions_of",
]
