"""Floor 3: where the LoRA factors of a live model are, and how they are read and replaced."""

from .modules import base_moved, base_weights, live_factors
from .writers import LiveWriter, Writer, writer_for

__all__ = [
    "LiveWriter",
    "Writer",
    "base_moved",
    "base_weights",
    "live_factors",
    "writer_for",
]
