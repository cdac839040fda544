"""Which rows come next: every row once before any comes again, shared out over the ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass


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
        number, within = divmod(place, self.size)
        order = list(range(self.size))
        random.Random(f"{self.seed} {number}").shuffle(order)
        return order[within]
