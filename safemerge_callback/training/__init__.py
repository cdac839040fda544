"""Floor 4: the callback and its settings; the only floor that imports transformers."""

from .callback import SafeMergeCallback
from .config import SafeMergeConfig
from .metrics import METRICS

__all__ = ["METRICS", "SafeMergeCallback", "SafeMergeConfig"]
