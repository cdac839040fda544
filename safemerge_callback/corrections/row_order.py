"""Which rows come next: every row once before any comes again, shared out over the ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..signals.rows import HARM


@dataclass
class RowOrder:
    """An order without end over `size` rows: each pass over them is shuffled by `seed` and its number.

    `drawn`: how many have come so far, on all ranks together, which is all its state: another number of ranks goes on
    from there.
    """

    size: int
    seed: int
    drawn: int = 0

    def draw(self, count: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """Return this rank's next `count` rows; the ranks together take `count` each, in the order of their numbers."""
        first = self.drawn + rank * count
        self.drawn += count * ranks
        return [self._at(place) for place in range(first, first + count)]

    def _at(self, place: int) -> int:
        return shuffled(range(self.size), self.seed, place)


@dataclass
class KindOrder(RowOrder):
    """The same where `share` of the places are for harmful rows, evenly spread, whatever share of the rows they are.

    `harmful`: the numbers of the harmful rows. Of each kind every row comes once before any of it comes again. Begins
    with a harmful row.
    """

    harmful: Sequence[int] = ()
    share: float = 0.5

    def _at(self, place: int) -> int:
        share = Fraction(str(self.share))  # .1 is a tenth: as a float the thirtieth place is above three
        before = math.ceil(place * share)
        if math.ceil((place + 1) * share) > before:
            return shuffled(self.harmful, self.seed, before)
        rest = sorted(set(range(self.size)) - set(self.harmful))
        return shuffled(rest, self.seed, place - before)


def shuffled(rows: Sequence[int], seed: int, place: int) -> int:
    """Return the row at a place of passes without end over `rows`, each shuffled by `seed` and its number."""
    number, within = divmod(place, len(rows))
    order = list(rows)
    random.Random(f"{seed} {number}").shuffle(order)
    return order[within]


def row_order(kinds: Sequence[str], seed: int, harmful_share: float | None) -> RowOrder:
    """Return the order over rows of such kinds; a share of None: all rows alike. A kind without rows has no places."""
    harmful = [row for row, kind in enumerate(kinds) if kind == HARM]
    if harmful_share is None or len(harmful) in (0, len(kinds)):
        return RowOrder(len(kinds), seed)
    return KindOrder(len(kinds), seed, harmful=harmful, share=harmful_share)
