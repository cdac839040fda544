"""`lisa`: blocks of steps on safety rows alone between blocks on the task, each drawn to where the other ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters import LoraFactors
from ..adapters.factor_file import read_pairs, write_pairs
from ..errors import AdapterError, ConfigError, shown
from ..io.file_faults import reading_fault
from ..io.numbers import is_number
from ..live.faults import Fault, attempt
from ..live.ranks import all_or_none, from_first, rank
from ..ops import LowRank
from ..record.metrics import Metric
from ..signals.rows import RowTokens
from .protocol import RunPoint, RunStart
from .proximal import proximal_point
from .registry import correction
from .replay import KindLosses, ReplaySettings, rows_of_run
from .row_source import RowSource, check_count
from .schedule import check_steps, interval
from .stopped_batches import stopped_batches

State = Literal["safe", "task"]
ANCHOR_FILE = "safemerge_lisa.safetensors"
# What a proximal step goes where neither strength nor rho is given.
STRENGTH = 0.01
FIGURES = {
    "loss_harm": Metric("loss", "last", "Mean loss of the harmful rows since it was last logged; absent if none came."),
    "loss_benign": Metric("loss", "last", "The same of the harmless rows."),
    "rows": Metric("rows", "last", "Safety rows that were trained on since then, on all processes."),
    "proximal_share": Metric("share", "last", "Share of the way to the other state's update that the last step went."),
    "residual": Metric("share", "last", "Largest share of an update that a proximal step has lost to the rank since."),
}


@dataclass(frozen=True)
class Blocks:
    """Which steps are whose: from `first` on `safe_steps` of the safety rows, then `task_steps` of the task, and so on.

    `last`: the last step of that, None for the run's.
    """

    safe_steps: int
    task_steps: int
    first: int = 1
    last: int | None = None

    def __str__(self) -> str:
        """Such as `safe_steps=10, task_steps=90, from_step=1, until_step=None`."""
        return (
            f"safe_steps={self.safe_steps}, task_steps={self.task_steps}, from_step={self.first}, "
            f"until_step={self.last}"
        )

    def state(self, step: int) -> State | None:
        """Return whose a step is; None outside of all blocks."""
        if step < self.first or (self.last is not None and step > self.last):
            return None
        return "safe" if (step - self.first) % (self.safe_steps + self.task_steps) < self.safe_steps else "task"

    def ends(self, step: int) -> bool:
        """Return whether a block ends with this step."""
        return self.state(step) != self.state(step + 1)

    def ever(self, max_steps: int) -> bool:
        """Return whether there is a safe step in a run of `max_steps`; ConfigError where there are only such."""
        if self.first <= 1 and self.last is None and max_steps <= self.safe_steps:
            raise ConfigError(
                f"correction 'lisa': safe_steps is {self.safe_steps}, which is all of this run of {max_steps} steps, "
                "so that the task is never trained: give fewer"
            )
        return self.first <= max_steps

    def due(self, step: int, max_steps: int, *, last: bool = False) -> bool:
        """Return whether a step is trained on safety rows."""
        return self.state(step) == "safe"


@dataclass(frozen=True, kw_only=True)
class LisaSettings(RowSource):
    """What `lisa` reads of its entry in the list of corrections, besides which rows.

    Blocks of `safe_steps` steps on safety rows alone and of `task_steps` on the task alone take turns, the former
    first, between `from_step` and `until_step`. After each step the update goes a share of the way to the one that the
    other state ended with: `strength`, or as the paper's `rho` has it, η·ρ/(1 + η·ρ), η the step's learning rate; 0.01
    if neither is given. Not before `proximal_from`, steps or, below 1, a share of the run's.
    """

    batch_size: int = 4
    safe_steps: int = 10
    task_steps: int = 90
    strength: float | None = None
    rho: float | None = None
    proximal_from: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("safe_steps", "task_steps"):
            check_count(name, getattr(self, name))
        if self.every != 1 or self.at_train_end:
            raise ConfigError(
                f"every is {self.every:g} and at_train_end {self.at_train_end}: blocks are of steps one after the "
                "other, so give safe_steps and task_steps, and leave these out"
            )
        if self.strength is not None and self.rho is not None:
            raise ConfigError(
                "strength and rho are both given: give the share of the way that a step goes, or the paper's weight"
            )
        if self.strength is not None and (not is_number(self.strength) or not 0 <= self.strength <= 1):
            raise ConfigError(f"strength is {shown(self.strength)}: give a share of the way, from 0 to 1")
        if self.rho is not None and (not is_number(self.rho) or self.rho < 0):
            raise ConfigError(f"rho is {shown(self.rho)}: give a number of 0 (blocks alone) or more")
        object.__setattr__(self, "proximal_from", check_steps("proximal_from", self.proximal_from))

    @property
    def blocks(self) -> Blocks:
        """Which steps are whose."""
        return Blocks(self.safe_steps, self.task_steps, max(1, self.from_step), self.until_step)

    def share(self, rate: float) -> float:
        """Return the share of the way that a step with this learning rate goes."""
        if self.rho is None:
            return STRENGTH if self.strength is None else float(self.strength)
        return rate * self.rho / (1 + rate * self.rho)


class Lisa:
    """The term, the blocks and the proximal steps of one run."""

    name = "lisa"
    noun = "place in the safety rows, and the updates that blocks ended with"
    weight = 1.0

    def __init__(self, settings: LisaSettings) -> None:
        self.settings = settings
        self.schedule = settings.blocks
        self.anchors: dict[State, dict[str, LowRank]] = {}
        self.rate: float | None = None
        self.losses = KindLosses()
        self.latest: tuple[Sequence[str], Tensor] | None = None
        self.passed = 0
        self.last_share = 0.0
        self.residual: Tensor | None = None

    @property
    def row_tokens(self) -> tuple[RowTokens, ...]:
        """The rows, once it is prepared."""
        return self.rows.tokens

    def prepare(self, start: RunStart) -> None:
        """Get the rows, without a reference. Collective. Raises as `replay_rows`, and without a tokenizer."""
        settings = ReplaySettings(**self.settings.of_source(), loss="ce", first_tokens=None)
        self.model, self.rows = start.model, rows_of_run(self.name, settings, start)

    def loss(self, at: RunPoint, model: nn.Module) -> Tensor:
        """Return the mean cross-entropy of this rank's next rows."""
        if not self.anchors:
            self.anchors["task"] = _copied(at.factors())
        if self.rate is None:
            self.rate = _rate(at.optimizer)
        losses, kinds = self.rows.next_losses(model)
        self.latest = kinds, losses.detach()
        return losses.mean()

    def observe(self, step: int, loss: float) -> None:
        """Take note that the pass on safety rows counted: the task's own batches are to teach nothing in this step."""
        self.passed = step
        if self.latest is not None:
            self.losses.add(*self.latest)

    def batches(self, at: RunPoint) -> AbstractContextManager[list[Fault]]:
        """Return that within which the task's batches teach nothing; where the safety rows' pass failed, they do."""
        return stopped_batches(self.model) if self.passed == at.step + 1 else nullcontext([])

    def proximal(self, at: RunPoint) -> Mapping[str, LowRank] | None:
        """Return the proximal point of the update of this step, and take note of where a block ended.

        Source: Lisa, arXiv:2405.18641, its proximal term. Differs: a step of its own in closed form, as decoupled
        weight decay has it, where the released code adds the term to a loss whose gradient Adam scales; and of the
        update B·A, where that takes the distances of A and of B.
        """
        rate, self.rate = self.rate, _rate(at.optimizer)
        state = self.schedule.state(at.step)
        if state is None:
            return None
        factors, new = at.factors(), None
        other = self.anchors.get("task" if state == "safe" else "safe")
        share = self.settings.share(rate or 0.0)
        if other is not None and share > 0 and at.step >= interval(self.settings.proximal_from, at.max_steps):
            new, residual = proximal_point(factors, other, share)
            self.residual = residual if self.residual is None else torch.maximum(self.residual, residual)
            self.last_share = share
        if self.schedule.ends(at.step):
            self.anchors[state] = _copied(factors) if new is None else new
        return new

    def figures(self) -> Mapping[str, float]:
        """Return mean losses by kind and the rows since they were last told, and the proximal step's. Collective."""
        residual, self.residual = self.residual, None
        drawn = {} if residual is None else {"proximal_share": self.last_share, "residual": float(residual)}
        return {**self.losses.take(), **drawn}

    def after_step(self, at: RunPoint) -> None:
        """Nothing follows a step: what is kept moves with the proximal step."""

    def save(self, folder: Path, save: str) -> None:
        """Write the anchors, and where the rows stand. Raises OSError."""
        pairs = {f"{state}.{name}": pair for state, anchor in self.anchors.items() for name, pair in anchor.items()}
        about = {"save": save, "drawn": json.dumps(self.rows.order.drawn), "rate": json.dumps(self.rate)}
        write_pairs(folder / ANCHOR_FILE, pairs, about)

    def load(self, folders: Sequence[Path], save: str | None) -> bool:
        """Go on from there; as `Kept.load`."""
        stored = from_first(all_or_none(lambda: read_anchors(folders, save) if rank() == 0 else None))
        if stored is None:
            return False
        self.anchors, self.rows.order.drawn, self.rate = stored
        return True

    def rewind(self, folders: Sequence[Path], save: str | None) -> None:
        """Take over the anchors of the checkpoint that the weights were reloaded from; the rows go on."""
        stored = attempt(self.name, lambda: read_anchors(folders, save))
        anchors = self.anchors if stored is None or isinstance(stored, Fault) else stored[0]
        self.anchors = from_first(anchors)


def read_anchors(
    folders: Sequence[Path], save: str | None
) -> tuple[dict[State, dict[str, LowRank]], int, float | None] | None:
    """Return what `save` wrote into the first of these folders that has it: anchors, rows drawn, and the learning rate.

    None where none has it; AdapterError where it cannot be read.
    """
    for path in (folder / ANCHOR_FILE for folder in folders):
        if not path.is_file():
            continue
        try:
            pairs, about = read_pairs(path)
            if save is None or about["save"] == save:
                anchors: dict[State, dict[str, LowRank]] = {}
                for key, pair in pairs.items():
                    state, _, name = key.partition(".")
                    anchors.setdefault("safe" if state == "safe" else "task", {})[name] = pair
                return anchors, int(json.loads(about["drawn"])), json.loads(about["rate"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            advice = "What blocks ended with is lost with it: take another checkpoint."
            raise AdapterError(f"{str(path)!r} {reading_fault(path, error, advice)}") from error
    return None


def _copied(factors: Mapping[str, LoraFactors]) -> dict[str, LowRank]:
    """The updates as they are now, which later steps do not reach."""
    return {name: LowRank(*(tensor.detach().clone() for tensor in one.update)) for name, one in factors.items()}


def _rate(optimizer: Any) -> float | None:
    """The learning rate of the optimizer's first group, that the next step has; None where there is none to ask."""
    groups = getattr(optimizer, "param_groups", None)
    return float(groups[0]["lr"]) if groups else None


@correction(
    LisaSettings,
    cost="one forward and backward pass of batch_size rows in each safe step, whose task batch is computed and dropped",
    deed="safety rows were trained on alone",
    figures=FIGURES,
    engines=("one process", "DDP"),
)
def lisa(settings: LisaSettings) -> Lisa:
    """Return the blocks of one run."""
    return Lisa(settings)
