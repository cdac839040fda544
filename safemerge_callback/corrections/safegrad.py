"""`safegrad`: replay by KL, whose conflict with the task is cut out of the task's gradient; a preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError, shown
from ..io.numbers import is_number
from .registry import correction
from .replay import FIGURES, ReplayApart, ReplaySettings
from .row_source import RowSource
from .surgery import without_conflict


@dataclass(frozen=True, kw_only=True)
class SafegradSettings(RowSource):
    """What `safegrad` reads of its entry in the list of corrections, besides which rows and when.

    `rho`: how much the safety gradient counts once the task's is without its part against it; 0: that part is taken
    out, and nothing is added. `first_tokens` of each response count (None: all).
    """

    rho: float = 1.0
    first_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.rho) or self.rho < 0:
            raise ConfigError(f"rho is {shown(self.rho)}: give a number of 0 or more")
        # What the rest is refused for is said there.
        _ = self.as_replay

    @property
    def as_replay(self) -> ReplaySettings:
        """The same in the words of `replay`."""
        return ReplaySettings(
            **self.of_source(), loss="kl", surgery=True, first_tokens=self.first_tokens, weight=self.rho or 1.0
        )


class Safegrad(ReplayApart):
    """The gradient term of one run."""

    def __init__(self, settings: SafegradSettings) -> None:
        super().__init__(settings.as_replay, "safegrad")
        self.adds = settings.rho > 0

    def combine(self, task: Sequence[Tensor], safety: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient that the optimizer gets."""
        return super().combine(task, safety) if self.adds else without_conflict(task, safety)


@correction(
    SafegradSettings,
    cost="one forward and backward pass of batch_size short rows a step",
    deed="the task's gradient was cleared of its conflict with safety rows",
    figures=FIGURES,
)
def safegrad(settings: SafegradSettings) -> Safegrad:
    """Return the term of one run.

    Source: SafeGrad, arXiv:2508.07172. Differs: as `kl` and `without_conflict` say; the aligned model is this one with
    its adapter off, asked once, not a second model in memory.
    """
    return Safegrad(settings)
