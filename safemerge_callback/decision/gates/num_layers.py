"""`num_layers`: a number of modules."""

from __future__ import annotations

from collections.abc import Iterable

from ..reading import Readings
from .checks import check_num_layers
from .common import Verdict, check_count, lowest, movable, unranked
from .registry import gate


def open_of(readings: Readings, *, num_layers: int) -> Iterable[str]:
    """Return the modules that may or may not be among the lowest."""
    return unranked(movable(readings), num_layers)


@gate(knob="num_layers", ranked=True, open_of=open_of)
def num_layers(readings: Readings, *, num_layers: int) -> dict[str, Verdict]:
    """Merge the `num_layers` modules of lowest cosine, ties by name.

    Source: Safe LoRA, arXiv:2405.16833, which calls it the number of layers to project. Differs: chosen from one
    measurement, before anything is edited; modules that have not moved are not chosen, so fewer may be. ConfigError
    for more than there are modules.
    """
    check_num_layers(num_layers)
    check_count(num_layers, readings)
    return lowest(readings, num_layers, lambda c: f"{'among' if c else 'not among'} the {num_layers} lowest")
