"""What a measure found of each module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..io.text_table import Table, html_table, render
from .moved import BAND, mean_moved


@dataclass(frozen=True)
class Reading:
    """One module measured.

    `cosine`: in [0, 1] (Safe LoRA, arXiv:2405.16833; SafeMERGE, arXiv:2503.17239), 1.0 for an update that is zero, NaN
    for one that is not finite. `null_cosine`: that of an update unrelated to V. `update_norm`: s·‖B·A‖ (Frobenius).
    `shape`: (d_out, d_in) of the map. `comparable` is False where aligned and unaligned are equal, so that V = 0 and
    `cosine` is 1.0 by convention. `interval`, where V is stored compressed: numbers that the cosine is proven to lie
    between, `cosine` being an estimate. `reread`: the compressed V left a decision open, so the exact one was read.
    `null_std`: the standard deviation that goes with `null_cosine`, for this rank; None where the subspace file has
    none. `reference`: the safety adapter's own cosine in this module, NaN where it has not moved; None if not asked.
    `signed_cosine`: ⟨V, ΔW⟩/(‖V‖·‖ΔW‖) in [-1, 1], not in the papers; below 0 the update undoes what aligned the model,
    which `cosine` does not see. None where the update is zero, V is, or is stored compressed.
    """

    name: str
    cosine: float
    null_cosine: float
    update_norm: float
    rank: int
    shape: tuple[int, int]
    comparable: bool = True
    interval: tuple[float, float] | None = None
    reread: bool = False
    null_std: float | None = None
    reference: float | None = None
    signed_cosine: float | None = None

    @property
    def signed_z(self) -> float | None:
        """The signed cosine in standard deviations of an unrelated update's, whose mean is 0; None where that is.

        A Gaussian update of any rank has E⟨V, ΔW⟩² = ‖V‖²·E‖ΔW‖²/(d_out·d_in), whatever V's spectrum.
        """
        return None if self.signed_cosine is None else self.signed_cosine * math.prod(self.shape) ** 0.5

    @property
    def moved(self) -> float | None:
        """How far the update goes along V: signed_z·‖ΔW‖ = √(d_out·d_in)·⟨V, ΔW⟩/‖V‖; None where signed_z is.

        Not in the papers. Unlike the cosines it shrinks when the update does.
        """
        return None if self.signed_z is None else self.signed_z * self.update_norm

    @property
    def lower(self) -> float:
        """The least that the cosine can be; `cosine` itself where V is exact."""
        return self.interval[0] if self.interval else self.cosine

    @property
    def upper(self) -> float:
        """The most that the cosine can be; `cosine` itself where V is exact."""
        return self.interval[1] if self.interval else self.cosine

    @property
    def proof(self) -> str:
        """How the cosine is known, in words."""
        if self.interval:
            return f"{self.lower:.4f} to {self.upper:.4f}"
        return "re-read" if self.reread else "exact"

    @property
    def finite(self) -> bool:
        """Whether the update holds finite numbers only."""
        return math.isfinite(self.cosine) and math.isfinite(self.update_norm)

    @property
    def measured(self) -> bool:
        """Whether there is something to measure: a finite update that is not zero, and a V."""
        return self.finite and self.comparable and self.update_norm != 0

    @property
    def drift(self) -> float:
        """1 - cosine, for display."""
        return 1.0 - self.cosine


class Readings(Mapping[str, Reading]):
    """Module name -> `Reading`, immutable, in the order measured; prints as a table."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = {reading.name: reading for reading in readings}

    def __getitem__(self, name: str) -> Reading:
        return self._readings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readings)

    def __len__(self) -> int:
        return len(self._readings)

    def below(self, threshold: float) -> list[str]:
        """Return the modules whose cosine lies strictly below `threshold`, compared unrounded; never a NaN."""
        return [name for name, reading in self.items() if reading.cosine < threshold]

    @property
    def moved_mean(self) -> float | None:
        """The mean of `moved` over the modules that have moved; None where none has, or one's is not known."""
        return mean_moved(reading.moved for reading in self.values() if reading.measured)

    @property
    def approximate(self) -> bool:
        """Whether any of them came from a compressed V, or would have but for a decision that it left open."""
        return any(reading.interval or reading.reread for reading in self.values())

    def __str__(self) -> str:
        return render(*self._table())

    def _repr_html_(self) -> str:
        """The same table as a notebook shows it."""
        return html_table(*self._table())

    def _table(self) -> Table:
        columns = ["module", "shape", "rank", "moved", "signed z", "cosine", "null", "‖update‖"]
        rows = [[*_row(reading)] for reading in self.values()]
        if self.approximate:
            columns.append("known as")
            rows = [[*row, reading.proof] for row, reading in zip(rows, self.values(), strict=True)]
        return self._title(), columns, rows, columns[1:]

    def _title(self) -> str:
        mean = self.moved_mean
        told = "" if mean is None else f"; moved {mean:+z.2f} on average, {BAND.words(mean)}"
        return f"{len(self)} modules measured{told}"

    def __repr__(self) -> str:
        return f"Readings({len(self)} modules)"


def _row(reading: Reading) -> tuple[str, ...]:
    shape = f"{reading.shape[0]} x {reading.shape[1]}"
    moved = "" if reading.moved is None else f"{reading.moved:+z.2f}"
    signed = "" if reading.signed_z is None else f"{reading.signed_z:+z.1f}"
    numbers = (moved, signed, f"{reading.cosine:.4f}", f"{reading.null_cosine:.4f}", f"{reading.update_norm:.4g}")
    return (reading.name, shape, str(reading.rank), *numbers)
