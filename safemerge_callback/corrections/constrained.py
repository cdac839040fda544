"""`constrained`: tokens of the task's answers count the less, the further the model has left the reference there.

The first tokens of an answer, where it is decided whether there is one, are bound the most. No safety data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError, shown
from ..io.numbers import is_number
from ..live.faults import Fault
from ..live.ranks import everyones
from ..live.stopwatch import Stopwatch
from ..ops import wide_dtype
from ..record.metrics import Metric
from ..signals.adapter_off import adapter_off
from ..signals.token_gains import headed
from .protocol import RunPoint, RunStart
from .registry import correction
from .schedule import Schedule
from .token_weights import weighed_tokens

FIGURES = {
    "token_weight": Metric("share", "last", "Mean weight of the task's tokens since it was last logged; 1: all of it."),
    "first_weight": Metric("share", "last", "The same of each answer's first tokens, those with a beta of their own."),
    "first_gain": Metric("nats", "last", "Mean log-probability that those have gained over the reference."),
}


@dataclass(frozen=True, kw_only=True)
class ConstrainedSettings(Schedule):
    """What `constrained` reads of its entry in the list of corrections.

    `betas`: how much each token of an answer is bound, from its first on; the last number is for all that follow. A
    token's weight is half of what it was once its log-probability has gained log(3)/beta nats over the reference, which
    are 2.2 at 0.5, 0.55 at 2 and 11 at 0.1; 0 binds nothing.
    """

    betas: Sequence[float] = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        betas = self.betas
        if not isinstance(betas, list | tuple) or not betas or not all(is_number(b) and b >= 0 for b in betas):
            raise ConfigError(
                f"betas is {shown(betas)}: give a list of numbers of 0 or more, one for each of an answer's first "
                "tokens, and last the one for all that follow"
            )
        if not any(betas):
            raise ConfigError("betas are all 0, which binds nothing: give one above 0, or leave the correction out")
        object.__setattr__(self, "betas", [float(beta) for beta in betas])


def token_weights(gains: Tensor, betas: Tensor) -> Tensor:
    """Return the weight of each token, 2·(1 - sigmoid(β·d)), of gains d in nats; 1 where d is 0, and where β is.

    Source: constrained fine-tuning, Qi et al., arXiv:2406.05946, the gradient of its objective. Differs: its released
    code keeps a floor of 1e-3, which a token bound by 2 reaches at a gain of 3.8 nats.
    """
    return 2 * torch.sigmoid(-betas * gains)


def constrained_losses(gains: Tensor, betas: Tensor) -> Tensor:
    """Return each token's loss, -(2/β)·log(2·sigmoid(β·d)), of slope -`token_weights` by d; -d where β is 0.

    Source: arXiv:2406.05946, its objective. Differs: the constant that makes it 0 where the model is the reference.
    """
    bound = betas.clamp(min=torch.finfo(betas.dtype).tiny)
    exact = (torch.nn.functional.softplus(-bound * gains) - torch.nn.functional.softplus(torch.zeros_like(gains))) * 2
    return torch.where(betas > 0, exact / bound, -gains)


@dataclass
class TokenSums:
    """What the tokens since the last report came to, on the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        """Take the sum and the number of each in."""
        for name, value in values.items():
            wide = wide_dtype(value.device)
            parts = torch.stack([value.sum(dtype=wide), value.new_tensor(value.numel(), dtype=wide)])
            self.sums[name] = self.sums[name] + parts if name in self.sums else parts

    def take(self) -> dict[str, float]:
        """Return the mean of each over the tokens of all ranks, and begin anew. Collective."""
        ranks = everyones({name: tuple(parts.tolist()) for name, parts in self.sums.items()})
        self.sums.clear()
        totals = {name: [one[name] for one in ranks if name in one] for name in sorted(set().union(*ranks))}
        counts = {name: sum(count for _, count in parts) for name, parts in totals.items()}
        return {name: sum(total for total, _ in totals[name]) / count for name, count in counts.items() if count}


class Constrained:
    """The token weights of one run."""

    name = "constrained"

    def __init__(self, settings: ConstrainedSettings) -> None:
        self.schedule = self.settings = settings
        self.sums = TokenSums()
        self.reported = 0.0

    def prepare(self, start: RunStart) -> None:
        """Look whether this model's tokens can be weighed. Raises ConfigError as `headed` and `adapter_off`."""
        with adapter_off(start.model):
            pass
        self.model, self.parts = start.model, headed(start.model)
        self.watch = Stopwatch(next(start.model.parameters()).device)

    def batches(self, at: RunPoint) -> AbstractContextManager[list[Fault]]:
        """Return that within which tokens count by their weights."""
        return weighed_tokens(self.model, self.parts, self.weigh, self.watch)

    def weigh(self, gains: Tensor, places: Tensor) -> Tensor:
        """Return the weights (m,) of tokens with these gains at these places of their answers."""
        betas = gains.new_tensor(self.settings.betas)[places.clamp(max=len(self.settings.betas) - 1)]
        weights, first = token_weights(gains, betas), places < len(self.settings.betas) - 1
        self.sums.add(
            loss=constrained_losses(gains, betas),
            token_weight=weights,
            first_weight=weights[first],
            first_gain=gains[first],
        )
        return weights

    def figures(self) -> Mapping[str, float]:
        """Return the means over the tokens since they were last told, with `loss` and `seconds`. Collective."""
        seconds = self.watch.seconds
        since, self.reported = seconds - self.reported, seconds
        return {**self.sums.take(), "seconds": since}


@correction(
    ConstrainedSettings,
    cost="one forward pass of the task's batch more, without gradients",
    deed="tokens of its answers were weighed by the reference",
    figures=FIGURES,
    engines=("one process", "DDP"),
)
def constrained(settings: ConstrainedSettings) -> Constrained:
    """Return the token weights of one run."""
    return Constrained(settings)
