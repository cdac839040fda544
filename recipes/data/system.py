"""A system prompt before the rows that are trained on, which need not be the one that is deployed (PTST)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safemerge_callback.errors import ConfigError, shown
from safemerge_callback.io.texts import check_whole


def check_system(name: str, system: Any) -> None:
    """Raise ConfigError for a system prompt that is none: a text that is not empty, or None for no such."""
    if system is not None and (not isinstance(system, str) or not system.strip()):
        raise ConfigError(f"{name} is {shown(system)}: give a text that is not empty, or leave it out")
    check_whole(system or "", name)


def with_system(rows: Sequence[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    """Return conversational rows that begin with this system prompt, in the place of any that they have."""
    turn = {"role": "system", "content": system}
    return [{**row, "prompt": [turn, *(one for one in row["prompt"] if one["role"] != "system")]} for row in rows]
