"""Floor 8: the callbacks and their settings."""

from ..record.metrics import METRICS
from .callback import SafeMergeCallback
from .config.settings import SafeMergeConfig
from .loop import LoopLog
from .probe.callback import SafetyEvalCallback
from .probe.rules import Rollback, Stop, Trigger

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
