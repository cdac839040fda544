"""Keep a language model's safety while it is fine-tuned: project, decide, merge, log."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .adapters import LoraFactors as LoraFactors
    from .adapters import load_adapter as load_adapter
    from .decision import MergePlan as MergePlan
    from .decision import apply as apply
    from .decision import measure as measure
    from .errors import SafeMergeError as SafeMergeError
    from .evaluation import mix_safety_data as mix_safety_data
    from .live import live_factors as live_factors
    from .live import writer_for as writer_for
    from .offline import apply_safelora as apply_safelora
    from .offline import apply_safemerge as apply_safemerge
    from .offline import measure_adapter as measure_adapter
    from .offline import merge_adapters as merge_adapters
    from .offline import push_adapter as push_adapter
    from .offline import sweep_adapters as sweep_adapters
    from .offline import undo_merge as undo_merge
    from .record import read_journal as read_journal
    from .subspace import Subspace as Subspace
    from .subspace import build_subspace as build_subspace
    from .subspace import compress_subspace as compress_subspace
    from .training import SafeMergeCallback as SafeMergeCallback
    from .training import SafeMergeConfig as SafeMergeConfig
    from .training import SafetyEvalCallback as SafetyEvalCallback


_HOMES = {
    "LoraFactors": "adapters",
    "MergePlan": "decision",
    "SafeMergeCallback": "training",
    "SafeMergeConfig": "training",
    "SafeMergeError": "errors",
    "SafetyEvalCallback": "training",
    "Subspace": "subspace",
    "apply": "decision",
    "apply_safelora": "offline",
    "apply_safemerge": "offline",
    "compress_subspace": "subspace",
    "build_subspace": "subspace",
    "live_factors": "live",
    "load_adapter": "adapters",
    "measure": "decision",
    "measure_adapter": "offline",
    "merge_adapters": "offline",
    "mix_safety_data": "evaluation",
    "push_adapter": "offline",
    "read_journal": "record",
    "sweep_adapters": "offline",
    "undo_merge": "offline",
    "writer_for": "live",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Resolve a public name on first use, so that importing the package loads not even torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
