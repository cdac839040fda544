"""Floor 1: where LoRA factors live, live or on disk, and how they are changed."""

from .checkpoint import Adapter, load_adapter, open_adapter, save_adapter
from .factors import LoraFactors
from .names import canonical_name
from .sites import base_moved, base_weights, live_factors
from .writers import LiveWriter, Writer, writer_for

__all__ = [
    "Adapter",
    "LoraFactors",
    "LiveWriter",
    "Writer",
    "base_moved",
    "base_weights",
    "canonical_name",
    "live_factors",
    "load_adapter",
    "open_adapter",
    "save_adapter",
    "writer_for",
]
