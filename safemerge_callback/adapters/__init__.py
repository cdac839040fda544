"""Floor 2: LoRA at rest: the names of its modules, its factors, the files that hold it."""

from typing import TYPE_CHECKING

from ..io.renamed import renamed
from .checkpoint import Adapter, load_adapter, open_adapter, save_adapter
from .factors import LoraFactors
from .names import canonical_name

__all__ = [
    "Adapter",
    "LoraFactors",
    "canonical_name",
    "load_adapter",
    "open_adapter",
    "save_adapter",
]

# Hidden from type checkers, to which a module with such a function has every name.
if not TYPE_CHECKING:
    __getattr__ = renamed(
        __name__,
        {
            "LiveWriter": "safemerge_callback.live",
            "Writer": "safemerge_callback.live",
            "base_moved": "safemerge_callback.live",
            "base_weights": "safemerge_callback.live",
            "live_factors": "safemerge_callback.live",
            "writer_for": "safemerge_callback.live",
        },
    )
