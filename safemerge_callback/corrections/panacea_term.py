"""`panacea_term`: added to a training, so that the step of `panacea` takes the loss of harmful answers further up."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..live.gradients import TrainedParameters
from ..live.ranks import world_size
from ..record.metrics import Metric
from .harmful_rows import HarmfulRows, HarmfulRowSettings, harmful_rows
from .perturbation import check_size, check_weight, contrast
from .protocol import RunPoint, RunStart, TermPass
from .registry import correction

# As that of `booster`, whose term this is with the step the other way.
SHARE = 0.003
FIGURES = {"rows": Metric("rows", "last", "Harmful rows that were shown since it was last logged, on all processes.")}


@dataclass(frozen=True, kw_only=True)
class PanaceaTermSettings(HarmfulRowSettings):
    """What `panacea_term` reads of its entry in the list of corrections.

    `weight` is the paper's λ. The step has the norm `share` times that of all that is trained (0.003 if neither is
    given), or `rho` in the paper's own unit.
    """

    weight: float = 0.001
    share: float | None = None
    rho: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.weight)
        object.__setattr__(self, "share", check_size("rho", self.rho, self.share, SHARE))


class PanaceaTerm:
    """The gradient term; `prepare` reads the rows."""

    name = "panacea_term"

    def __init__(self, settings: PanaceaTermSettings) -> None:
        self.settings = self.schedule = settings
        self.weight = settings.weight
        self.rows: HarmfulRows | None = None
        self.shown = 0

    def prepare(self, start: RunStart) -> None:
        """Read the rows. Collective. Raises ConfigError as `harmful_rows`."""
        self.rows = harmful_rows(self.name, self.settings, start)

    def passes(self, at: RunPoint, model: nn.Module, trained: TrainedParameters) -> Generator[TermPass, Tensor, None]:
        """Yield the loss of this rank's rows where the parameters are, and a step up its gradient, negative.

        Source: Panacea, arXiv:2501.18100: g = ∇f - λ(∇h(w + ε) - ∇h(w)). Differs: ε is that of the step's own rows,
        made anew each time; once an optimizer step whatever the accumulation; and no loss is clamped, where the release
        does so with a name that it does not have, and learns the harmful rows where the clamp holds.
        """
        assert self.rows is not None, "prepare comes before the first step"
        yield from contrast(self.rows.loss(at), trained, 1.0, norm=self.settings.rho, share=self.settings.share)

    def observe(self, step: int, loss: float) -> None:
        """Count the rows of passes that counted."""
        self.shown += self.settings.batch_size * world_size()

    def figures(self) -> Mapping[str, float]:
        """Return the rows since they were last told."""
        rows, self.shown = float(self.shown), 0
        return {"rows": rows}


@correction(
    PanaceaTermSettings,
    cost="two forward and backward passes of batch_size harmful rows a step",
    deed="a step up the loss of harmful answers was prepared",
    figures=FIGURES,
)
def panacea_term(settings: PanaceaTermSettings) -> PanaceaTerm:
    """Return the term of one run."""
    return PanaceaTerm(settings)
