"""What is asked of safety rows: a loss is a file, and its name is YAML's; importing the folder fills the registry."""

from . import ce, kl, sbr
from .registry import LOSSES, RowLoss, row_loss

__all__ = ["LOSSES", "RowLoss", "ce", "kl", "row_loss", "sbr"]
