"""Floor 4: the callbacks and their settings; the only floor that imports transformers."""

from .callback import SafeMergeCallback
from .config import SafeMergeConfig
from .loop import LoopLog
from .metrics import METRICS
from .rules import Rollback, Stop, Trigger
from .safety_eval import SafetyEvalCallback

__all__ = [
    "METRICS",
    "LoopLog",
    "Rollback",
    "SafeMergeCallback",
    "SafeMergeConfig",
    "SafetyEvalCallback",
    "Stop",
    "Trigger",
]
