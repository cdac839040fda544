"""What a correction is given, and what it gives back; no correction inherits from anything."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from ..adapters import Adapter, LoraFactors
from ..decision import Edit, MergePlan
from ..live import Writer
from ..live.faults import Fault
from ..live.gradients import TrainedParameters
from ..ops import Grams, LowRank
from ..signals.check_data import CheckData
from ..subspace import Subspace
from .schedule import Schedule

# The line of a change in the journal, made of what the engine knows once it is written: module -> the share of the
# task's update that all changes so far have left, and the seconds that this one took.
Entry = Callable[[Mapping[str, float], float], Mapping[str, Any]]


@dataclass(frozen=True)
class RunPoint:
    """Where a run stands when a correction is asked, and what it may look at; nothing of the trainer is in it.

    `step` of `max_steps` optimizer steps is done. `safety`: the safety adapters, `optimizer` what the trainer gives its
    callbacks. `plan`: what the check of this step decided, where there was one. `subspace` is None where the run has
    none, and nothing is measured. `data`: the live model and the rows that the check asked it about, None where nobody
    needs any.
    """

    step: int
    max_steps: int
    writer: Writer
    subspace: Subspace | None
    safety: Sequence[Adapter] = ()
    optimizer: Any = None
    plan: MergePlan | None = None
    data: CheckData | None = None

    @property
    def grams(self) -> Mapping[str, Grams] | None:
        """The Grams of each module's inputs, where a method needs them."""
        return self.data.grams if self.data is not None else None

    def factors(self) -> dict[str, LoraFactors]:
        """Return module -> the live factors as they are now, not copied. Collective as `Writer.gather`."""
        return self.writer.gather()


@dataclass(frozen=True)
class RunStart:
    """What a run begins with, before its first step: what a correction may ready itself with.

    `model` is the one of the trainer's hooks, its adapter on; `tokenizer` a tokenizer or a processor, None where the
    trainer has none. `say` tells the terminal a line. `bars`: whether this rank may draw a progress bar: it is the
    first, and nobody asked it to be quiet.
    """

    model: nn.Module
    tokenizer: Any
    say: Callable[[str], None]
    bars: bool = False


class Change(NamedTuple):
    """What a correction wants written: computed and checked, nothing written yet.

    `new`: module -> factors in the live adapter's units, A (r, d_in) and B (d_out, r). `edits`: what that does to each
    of them. `task_weights`: module -> the share of the task's own update that this change leaves in it. `entry` makes
    its line for the journal. `merge`: whether it counts as a merge, which the cooldown and re-arming go by.
    """

    new: Mapping[str, LowRank]
    edits: tuple[Edit, ...]
    task_weights: Mapping[str, float]
    entry: Entry
    merge: bool = False


@runtime_checkable
class Correction(Protocol):
    """Changes the factors of a run."""

    @property
    def name(self) -> str:
        """What it is called in the journal and in YAML."""

    @property
    def schedule(self) -> Schedule:
        """When: after which optimizer steps."""

    def change(self, at: RunPoint) -> Change | None:
        """Return what is to be written, or None for nothing. Every rank calls it, and must come to the same modules.

        What it raises, on any rank, costs this change and nothing else; rank 0's factors are those that count.
        """


@runtime_checkable
class Term(Protocol):
    """What adds to the gradient of a run, before its optimizer's step, has: a `GradientTerm` or a `PassSeries`."""

    @property
    def name(self) -> str:
        """What it is called in the journal and in YAML."""

    @property
    def schedule(self) -> Schedule:
        """When: in which optimizer steps, the first being 1."""

    @property
    def weight(self) -> float:
        """What its gradient is multiplied by, once a step and whatever the accumulation; 0 is absence."""


@runtime_checkable
class GradientTerm(Term, Protocol):
    """Adds the gradient of a loss."""

    def loss(self, at: RunPoint, model: nn.Module) -> Tensor:
        """Return this rank's mean loss on rows of the term's own, a scalar; the mean over the ranks counts.

        Called in training mode with gradients, before the step's own batches. `at.step` steps are done. What it raises,
        and a loss that is NaN or infinite on any rank, costs this step's term and nothing else; but where every rank
        must run a pass together, under FSDP and DeepSpeed, an error ends the training. What it draws leaves the task's
        random numbers be.
        """


class TermPass(NamedTuple):
    """One pass of a series: what its gradient counts in the sum, the loss of the model, a scalar, and where.

    `displacement` is what the trained parameters have more during this pass, this rank's part (n,) as
    `TrainedParameters.vector`; None for nothing.
    """

    weight: float
    loss: Callable[[nn.Module], Tensor]
    displacement: Tensor | None = None


@runtime_checkable
class PassSeries(Term, Protocol):
    """Adds a sum of gradients of several passes, of which each may be at a point that the earlier ones decide."""

    def passes(self, at: RunPoint, model: nn.Module, trained: TrainedParameters) -> Generator[TermPass, Tensor, None]:
        """Yield each pass; what `yield` gives is its gradient, unweighted and the mean over the ranks.

        That is this rank's part (n,), as `trained.vector`. Called as `GradientTerm.loss`: every rank yields as many
        passes, of rows of its own and the same in all passes of a step; each begins with the same random state, so that
        what is dropped out is the same, too. The loss of the first is what is told. A loss or a gradient that is not
        finite on any rank, and an error, cost the whole sum of this step; the parameters are put back whatever happens.
        """


@runtime_checkable
class Batchwise(Protocol):
    """Corrects what the trainer's own batches give to a step's gradient; a gradient term may do so besides."""

    @property
    def name(self) -> str:
        """What it is called in the journal and in YAML."""

    @property
    def schedule(self) -> Schedule:
        """When: in which optimizer steps, the first being 1."""

    def batches(self, at: RunPoint) -> AbstractContextManager[list[Fault]]:
        """Return what is entered before the step's first batch and left before the optimizer's step.

        Every rank enters it alike, after the passes of gradient terms; `at.step` steps are done. It yields what goes
        wrong within, which must cost a batch its correction and nothing else. Where it has `figures`, those named
        `loss` and `seconds` are its mean loss and what it took.
        """


@runtime_checkable
class Proximal(Protocol):
    """Draws the weights toward something right after an optimizer step, as a part of that step; a gradient term."""

    @property
    def name(self) -> str:
        """What it is called in the journal, where it fails."""

    def proximal(self, at: RunPoint) -> Mapping[str, LowRank] | None:
        """Return module -> the factors that the step is to end with, in the live units, or None for the present ones.

        Every rank calls it after every step, before anything else follows it; what it raises, on any rank, costs this
        proximal step and nothing else.
        """


@runtime_checkable
class Prepared(Protocol):
    """Readies itself before the first step."""

    def prepare(self, start: RunStart) -> None:
        """Look at the model, which is left as it was. Every rank calls it, before any state of a checkpoint is read.

        Raises a SafeMergeError child, on all ranks, for what cannot be.
        """


@runtime_checkable
class Observant(Protocol):
    """A gradient term that is told what its loss was."""

    def observe(self, step: int, loss: float, /) -> None:
        """Take the mean loss over the ranks, unweighted and the same on every rank, in the step that is number `step`.

        Called after the pass, not for one whose loss was dropped: so all ranks may decide alike by it.
        """


@runtime_checkable
class Apart(Protocol):
    """A gradient term whose gradient joins the task's by a rule of its own, after that was clipped."""

    def combine(self, task: list[Tensor], term: list[Tensor], /) -> list[Tensor]:
        """Return what the optimizer gets, in the shapes of `task`; both are means over the ranks, the term's weighted.

        Each list is one vector: a tensor for each parameter that is trained, or under FSDP a single one of all. Every
        rank calls it with the same numbers. Both may be overwritten.
        """


@runtime_checkable
class Unadded(Protocol):
    """One that is kept apart and may change the task's gradient without adding its own."""

    @property
    def adds(self) -> bool:
        """Whether its own is added; where not, its weight is told as 0."""


@runtime_checkable
class Tallied(Protocol):
    """A gradient term with figures of its own."""

    def figures(self) -> Mapping[str, float]:
        """Return figures by name since they were last asked for, whenever the trainer logs. Every rank is asked.

        Reports add up what is called `rows`, and draw `loss_KIND` as the mean loss of the rows of a kind.
        """


@runtime_checkable
class Kept(Protocol):
    """State of a correction that follows the run and that its checkpoints hold."""

    @property
    def name(self) -> str:
        """What it is called in the journal, where it fails."""

    @property
    def noun(self) -> str:
        """What it is in words that follow `the` and `no`: "average of the run's updates"."""

    def after_step(self, at: RunPoint) -> None:
        """Follow an optimizer step. Every rank calls it; what it raises costs this step of the state, and is told."""

    def save(self, folder: Path, save: str) -> None:
        """Write the state into a checkpoint's folder, whole or not at all, as part of `save`. The first rank alone.

        Raises OSError.
        """

    def load(self, folders: Sequence[Path], save: str | None) -> bool:
        """Go on from what `save` (None: any) put into the first of these folders that has it; False where none has.

        Every rank calls it, and the first reads. Raises AdapterError, on all ranks, for a state that cannot be read.
        """

    def rewind(self, folders: Sequence[Path], save: str | None) -> None:
        """Take over what `load` would, now that the weights are those again; without it the state stays as it is."""
