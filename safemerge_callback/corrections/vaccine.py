"""`vaccine`: attention blocks' outputs moved against the loss while it is trained: what is learned withstands that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, shown
from ..io.numbers import is_number
from ..io.patterns import as_pattern
from ..live.faults import Fault
from ..live.ranks import everyones
from ..live.stopwatch import Stopwatch
from ..record.metrics import Metric
from .perturbed_blocks import attention_blocks, moved_along, perturbed_batches
from .protocol import RunPoint, RunStart
from .registry import correction
from .schedule import Schedule

# Of the outputs' norm. Along a gradient little is needed; not tuned.
SHARE = 1e-4
FIGURES = {
    "rise": Metric("nats a token", "last", "What the perturbation adds to the training's loss; mean since then."),
}


def check_perturbation(rho: Any, share: Any) -> float | None:
    """Return the share in force, None where `rho` is; 0 is absence. ConfigError for what cannot be, and for both."""
    for name, value in (("rho", rho), ("share", share)):
        if value is not None and (not is_number(value) or value < 0):
            raise ConfigError(f"{name} is {shown(value)}: give a number of 0 (off) or more")
    if share is not None and share > 1:
        raise ConfigError(f"share is {shown(share)}: give a share of what a row's outputs are, from 0 to 1")
    if rho is not None and share is not None:
        raise ConfigError(
            f"rho {shown(rho)} and share {shown(share)} are both given: give rho, the norm over a batch, or share, of "
            "what each row's outputs are"
        )
    return float(share if share is not None else SHARE) if rho is None else None


@dataclass(frozen=True, kw_only=True)
class VaccineSettings(Schedule):
    """What `vaccine` reads of its entry in the list of corrections.

    Each row's perturbation has the norm `share` times that of its blocks' outputs (0.0001 if neither is given); or that
    of a whole batch the norm `rho`, in the paper's own unit. 0 is absence. `blocks`: a pattern of the paths of modules
    to perturb (None: the attention blocks).
    """

    share: float | None = None
    rho: float | None = None
    blocks: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "share", check_perturbation(self.rho, self.share))
        if self.blocks is not None:
            as_pattern(self.blocks, "blocks")


class Vaccine:
    """The perturbation of one run's own batches."""

    name = "vaccine"

    def __init__(self, settings: VaccineSettings) -> None:
        self.schedule = self.settings = settings
        self.losses: list[tuple[Tensor, Tensor]] = []
        self.reported = 0.0

    def prepare(self, start: RunStart) -> None:
        """Look for the blocks. Raises ConfigError as `attention_blocks`."""
        self.model: nn.Module = start.model
        self.blocks = attention_blocks(start.model, self.settings.blocks)
        self.watch = Stopwatch(next(start.model.parameters()).device)
        start.say(f"{self.name}: the outputs of {len(self.blocks)} blocks are perturbed, two passes a batch")

    @contextmanager
    def batches(self, at: RunPoint) -> Iterator[list[Fault]]:
        """Perturb the batches that pass within.

        Source: Vaccine, arXiv:2402.01109, its two passes. Differs: the same dropout in both, hooks in place of the
        outputs' `.data`, and a norm that batches and accumulation do not change, where `rho` is not given.
        """
        with self.perturbed(self.blocks, at) as faults:
            yield faults

    @contextmanager
    def perturbed(self, blocks: Mapping[str, nn.Module], at: RunPoint) -> Iterator[list[Fault]]:
        """Perturb the outputs of these blocks within; yield what goes wrong."""
        rho, share = self.settings.rho, self.settings.share
        if not (rho or share):
            yield []
            return
        rule = partial(moved_along, rho=rho, share=share)
        scaler = getattr(at.optimizer, "scaler", None)
        with perturbed_batches(self.model, self.name, blocks, rule, self.watch, scaler) as batches:
            yield batches.faults
        self.losses += batches.losses

    def figures(self) -> Mapping[str, float]:
        """Return the mean loss without the perturbation and what that adds, since they were last told. Collective."""
        pairs = everyones(torch.stack([torch.stack(pair) for pair in self.losses]).tolist() if self.losses else [])
        before, after = ([pair[i] for rank in pairs for pair in rank] for i in (0, 1))
        self.losses = []
        since, self.reported = self.watch.seconds - self.reported, self.watch.seconds
        if not before:
            return {"seconds": since}
        loss = sum(before) / len(before)
        return {"loss": loss, "rise": sum(after) / len(after) - loss, "seconds": since}


@correction(
    VaccineSettings,
    cost="one forward and backward pass of the task's batch more, without gradients of parameters",
    deed="the outputs of its blocks were perturbed",
    figures=FIGURES,
    engines=("one process", "DDP"),
)
def vaccine(settings: VaccineSettings) -> Vaccine:
    """Return the correction of one run."""
    return Vaccine(settings)
