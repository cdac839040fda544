"""Floor 5: the same verbs on adapter folders, without a model: measure one, or merge two into a third."""

from .merge import measure_adapter, merge_adapters

__all__ = ["measure_adapter", "merge_adapters"]
