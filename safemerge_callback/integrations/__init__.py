"""The callback in other trainers, with its settings in the trainer's own YAML; a module imports its host alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["split_settings"]


def split_settings(values: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values whose keys begin with `prefix`, by the rest of the key, and all the others as they are."""
    ours = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    return ours, {key: value for key, value in values.items() if not key.startswith(prefix)}
