"""Floor 8: the same verbs on adapter folders, without a model: measure one, merge two, or take a merge back."""

from .bake import BaseModel
from .bake_adapter import bake_adapter
from .fuse import fuse_adapters
from .merge import measure_adapter, merge_adapters
from .peft_model import apply_safelora, apply_safemerge
from .publish import push_adapter
from .search import search_merge
from .sweep.sweep import Cell, Sweep, sweep_adapters
from .undo import undo_merge

__all__ = [
    "BaseModel",
    "Cell",
    "Sweep",
    "apply_safelora",
    "apply_safemerge",
    "bake_adapter",
    "fuse_adapters",
    "measure_adapter",
    "merge_adapters",
    "push_adapter",
    "search_merge",
    "sweep_adapters",
    "undo_merge",
]
