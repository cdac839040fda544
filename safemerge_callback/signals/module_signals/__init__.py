"""What a live model says of each module: a signal is a file; importing the folder fills the registry."""

from . import gradient_norm, gram_cosine, learned_share, safety_slope, task_slope, unused_features
from .registry import MODULE_SIGNALS, ModuleSignal, check_engine, data_among, module_signal, signals_among

__all__ = [
    "MODULE_SIGNALS",
    "ModuleSignal",
    "check_engine",
    "data_among",
    "gradient_norm",
    "gram_cosine",
    "learned_share",
    "module_signal",
    "safety_slope",
    "signals_among",
    "task_slope",
    "unused_features",
]
