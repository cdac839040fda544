"""The registry of minimisers: each asks a problem for its loss or gradient at points of [0, 1]ⁿ, and returns nothing.

The problem remembers what it was asked, and the best point of all rows is the answer: nobody returns the last it tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ...io.choices import one_of


class Problem(Protocol):
    """What is minimised: n numbers in [0, 1]."""

    @property
    def start(self) -> Sequence[float]:
        """Where to begin, n numbers."""

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers as rows × columns, by row; (n, 1) where they have no such order."""

    def loss(self, point: Sequence[float], batch: int | None = None) -> float:
        """Return the loss at a point, infinite where it is no number.

        On all rows, which makes the point a candidate, or with `batch` on some, the same for the same number.
        """

    def gradient(self, point: Sequence[float], batch: int | None = None) -> tuple[float, list[float]]:
        """Return the loss as `loss`, and its n derivatives, not finite where the loss is not."""


class Effort(NamedTuple):
    """How much may be asked: `evaluations` of a loss or a gradient; `seed`: what random numbers are drawn by."""

    evaluations: int
    seed: int = 0


@dataclass(frozen=True)
class Minimiser:
    """A minimiser: `function(problem, effort)`.

    `evaluations`: its effort by default. `least` and `most`: for how many numbers it is. `backward`: whether it asks
    for gradients.
    """

    name: str
    function: Callable[[Problem, Effort], None]
    evaluations: int
    least: int = 1
    most: int | None = None
    backward: bool = False


MINIMISERS: dict[str, Minimiser] = {}


def minimiser(
    evaluations: int, *, least: int = 1, most: int | None = None, backward: bool = False
) -> Callable[[Callable[[Problem, Effort], None]], Callable[[Problem, Effort], None]]:
    """Enter a minimiser under its function's own name; the fields are those of `Minimiser`."""

    def enter(function: Callable[[Problem, Effort], None]) -> Callable[[Problem, Effort], None]:
        name = function.__name__
        MINIMISERS[name] = Minimiser(name, function, evaluations, least, most, backward)
        return function

    return enter


def get_minimiser(name: str) -> Minimiser:
    """Return the minimiser called `name`; ConfigError names those there are."""
    return MINIMISERS[one_of(name, sorted(MINIMISERS), "minimiser")]
