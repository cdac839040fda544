"""`booster`: the loss of harmful answers made flat along its own gradient, so that steps on them gain little."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..live.gradients import TrainedParameters
from ..live.ranks import everyones
from ..record.metrics import Metric
from .harmful_rows import HarmfulRows, HarmfulRowSettings, harmful_rows
from .perturbation import check_size, check_weight, contrast
from .protocol import RunPoint, RunStart, TermPass
from .registry import correction

# The release's step of 0.1 is about this share of its adapter's norm when it begins: rank 32 on 96 modules.
SHARE = 0.003
FIGURES = {
    "rows": Metric("rows", "last", "Harmful rows that were shown since it was last logged, on all processes."),
    "reduction": Metric(
        "nats a token",
        "min",
        "What one step along its gradient takes off the loss of harmful answers; mean since then.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class BoosterSettings(HarmfulRowSettings):
    """What `booster` reads of its entry in the list of corrections.

    `weight` is the paper's λ. The step along the gradient of the harmful loss has the norm `share` times that of all
    that is trained (0.003 if neither is given), or `alpha` in the paper's own unit.
    """

    weight: float = 5.0
    share: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.weight)
        object.__setattr__(self, "share", check_size("alpha", self.alpha, self.share, SHARE))


class Booster:
    """The gradient term; `prepare` reads the rows."""

    name = "booster"

    def __init__(self, settings: BoosterSettings) -> None:
        self.settings = self.schedule = settings
        self.weight = settings.weight
        self.rows: HarmfulRows | None = None
        self.losses: list[Tensor] = []
        self.reductions: list[Tensor] = []

    def prepare(self, start: RunStart) -> None:
        """Read the rows. Collective. Raises ConfigError as `harmful_rows`."""
        self.rows = harmful_rows(self.name, self.settings, start)

    def passes(self, at: RunPoint, model: nn.Module, trained: TrainedParameters) -> Generator[TermPass, Tensor, None]:
        """Yield the loss of this rank's rows where the parameters are, and a step down its gradient, negative.

        Source: Booster, arXiv:2409.01586, its harmful gradients. Differs: once an optimizer step whatever the
        accumulation, which its released code cannot have; both passes drop out the same; and parameters are put back
        from a copy, where that code steps there and back in bf16.
        """
        assert self.rows is not None, "prepare comes before the first step"
        loss, self.losses = self._noted(self.rows.loss(at)), []
        yield from contrast(loss, trained, -1.0, norm=self.settings.alpha, share=self.settings.share)

    def _noted(self, loss: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
        """The loss, whose values are kept, on the device."""

        def noted(model: nn.Module) -> Tensor:
            value = loss(model)
            self.losses.append(value.detach())
            return value

        return noted

    def observe(self, step: int, loss: float) -> None:
        """Take note of what the step along the gradient took off the loss, in passes that counted."""
        first, displaced = self.losses
        self.reductions.append(first - displaced)

    def figures(self) -> Mapping[str, float]:
        """Return the rows and the mean reduction since they were last told. Collective."""
        mine = torch.stack(self.reductions).tolist() if self.reductions else []
        self.reductions = []
        reductions = [one for share in everyones(mine) for one in share]
        rows = float(len(reductions) * self.settings.batch_size)
        return {"rows": rows, "reduction": sum(reductions) / len(reductions)} if reductions else {"rows": 0.0}


@correction(
    BoosterSettings,
    cost="two forward and backward passes of batch_size harmful rows a step",
    deed="the loss of harmful answers was flattened",
    figures=FIGURES,
)
def booster(settings: BoosterSettings) -> Booster:
    """Return the term of one run."""
    return Booster(settings)
