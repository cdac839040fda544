"""How a live model's factors are read and replaced; the only place that asks how the model is sharded."""

from .writer import LiveWriter, Writer, writer_for

__all__ = ["LiveWriter", "Writer", "writer_for"]
