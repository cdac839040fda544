"""Which module goes where in a picture: one panel a module type, one row a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "outside the layers"


class Panel(NamedTuple):
    """One module type: its modules, and the label of each one's row (its layer, and its expert where it has one)."""

    title: str
    modules: tuple[str, ...]
    labels: tuple[str, ...]


def panels(modules: Iterable[str]) -> list[Panel]:
    """Return the panels in the order in which their types first appear; each one's rows ascend by layer.

    `layers.3.self_attn.q_proj` is layer 3 of type `q_proj`; a type's name is as long as it must be to tell it from the
    others. Modules without a number (embeddings, output head) share the last panel.
    """
    types: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    outside: list[str] = []
    for name in modules:
        kind, numbers = _split(name)
        if numbers:
            types.setdefault(kind, []).append((numbers, name))
        else:
            outside.append(name)
    titles = _short(list(types))
    found = [_panel(titles[kind], sorted(rows)) for kind, rows in types.items()]
    return [*found, Panel(OUTSIDE, tuple(outside), tuple(outside))] if outside else found


def _panel(title: str, rows: Sequence[tuple[tuple[int, ...], str]]) -> Panel:
    labels = tuple(".".join(map(str, numbers)) for numbers, _ in rows)
    return Panel(title, tuple(name for _, name in rows), labels)


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """The name without its numbers, and the numbers."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    return ".".join(part for part in parts if not part.isdecimal()), numbers


def _short(types: Sequence[str]) -> dict[str, str]:
    """The last part of each type, or more of them where several types end alike."""
    return {kind: _shortest_ending(kind.split("."), [t.split(".") for t in types if t != kind]) for kind in types}


def _shortest_ending(parts: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    lengths = range(1, len(parts) + 1)
    enough = next((n for n in lengths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
    return ".".join(parts[-enough:])
