"""How many there are, in words; the table, the watch, the pictures and the page all say it so."""

from __future__ import annotations

from collections.abc import Sized


def counted(things: Sized, noun: str) -> str:
    """Return `1 merge`, `2 merges`."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
