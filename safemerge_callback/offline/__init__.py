"""Floor 5: the same verbs on adapter folders, without a model: measure one, merge two, or take a merge back."""

from .merge import measure_adapter, merge_adapters
from .undo import undo_merge

__all__ = ["measure_adapter", "merge_adapters", "undo_merge"]
