"""Rows of a dataset on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from safemerge_callback.errors import ConfigError


def load_rows(dataset: str, config: str, split: str) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a split; ConfigError where `datasets` is not installed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"{dataset!r} needs datasets: pip install 'safemerge-callback[recipes]'") from None
    return load_dataset(dataset, config, split=split)
