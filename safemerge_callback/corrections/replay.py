"""`replay`: a few rows of what the aligned model says, in every step beside the task's batch, as a gradient term."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, shown
from ..evaluation.harvest import check_lengths, harvest
from ..evaluation.prompts import PACKAGED, load_prompts
from ..evaluation.rows import load_rows
from ..io.choices import one_of, truth
from ..io.numbers import is_number, is_whole
from ..live.ranks import all_or_none, everyones, from_first, mean_over_ranks, rank, world_size
from ..live.stopwatch import settled
from ..record.metrics import Metric
from ..signals.adapter_off import adapter_off
from ..signals.reference import Reference, take_reference
from ..signals.responses import check_vocabulary
from ..signals.row_batch import row_batch, row_outputs
from ..signals.rows import RowTokens, row_formats, row_tokens
from .losses import LOSSES, RowLoss
from .need import Need, mean_rise, spreads_by_kind
from .pace import Pace
from .protocol import RunPoint, RunStart
from .registry import correction
from .row_order import RowOrder, row_order
from .row_source import RowSource, check_count, tokenizer_of
from .schedule import Schedule
from .state_file import read_state, write_state
from .surgery import bounded, without_conflict

# What it is called in a list of corrections.
REPLAY = "replay"
FIGURES = {
    "loss_harm": Metric("loss", "last", "Mean loss of the harmful rows since it was last logged; absent if none came."),
    "loss_benign": Metric("loss", "last", "The same of the harmless rows."),
    "rows": Metric("rows", "last", "Rows that were replayed since then, on all processes."),
    "interval": Metric("steps", "last", "Optimizer steps from one time to the next, as it is now."),
}


@dataclass(frozen=True, kw_only=True)
class ReplaySettings(RowSource):
    """What `replay` reads of its entry in the list of corrections, besides which rows and when.

    The loss is one of `LOSSES`, over the first `first_tokens` of each response (None: all of it), against the
    reference's `top_k` likeliest tokens (None: all). `batch_size` rows a rank count `weight` times a step.
    `harmful_share` and `weight` were chosen on a validation split (docs/replay.md). `hinge`: only what is
    above the reference's own loss by so many of its spreads. `surgery`: the task's gradient without its part against
    this one. `max_norm`: this one's norm is at most such a share of the task's.

    `by_need` (off: docs/replay.md has a run that lost refusals by it): the interval doubles, up to `longest` times
    `every`, while the rows of the last times are on average no more than `tolerance` of the reference's own spreads
    above it. `max_share`: the share of the training's time that it may take, None for any: with it two runs on machines
    of other speed may differ.
    """

    loss: str = "kl"
    harmful_share: float | None = 0.8
    first_tokens: int | None = 8
    top_k: int | None = 256
    weight: float = 2.0
    hinge: float | None = None
    surgery: bool = False
    max_norm: float | None = None
    by_need: bool = False
    longest: int = 4
    tolerance: float = 0.15
    max_share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.loss, LOSSES, "loss")
        check_count("longest", self.longest)
        for name in ("first_tokens", "top_k"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        self._check_numbers()
        for name in ("surgery", "by_need"):
            truth(getattr(self, name), name)

    def _check_numbers(self) -> None:
        if not is_number(self.weight) or self.weight < 0:
            raise ConfigError(f"weight is {shown(self.weight)}: give a number of 0 (off) or more")
        if not is_number(self.tolerance) or self.tolerance <= 0:
            raise ConfigError(f"tolerance is {shown(self.tolerance)}: give a number of spreads above 0")
        for name in ("hinge", "max_norm"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or value <= 0):
                raise ConfigError(f"{name} is {shown(value)}: give a number above 0, or leave it out")
        share = self.max_share
        if share is not None and (not is_number(share) or not 0 < share < 1):
            raise ConfigError(f"max_share is {shown(share)}: give a share of the training's time between 0 and 1")


def safety_rows(
    model: nn.Module, tokenizer: Any, settings: ReplaySettings, *, bars: bool = True
) -> tuple[list[RowTokens], str]:
    """Return the rows as this model's tokens, and a sentence on them: given, or the model's own answers as it is now.

    In each of the formats; with `bars`, answering draws a progress bar. Collective. Raises ConfigError as `harvest`,
    `load_prompts` and `load_rows`.
    """
    formats = row_formats(settings.in_format)
    if settings.rows is not None:
        rows = all_or_none(lambda: load_rows(settings.rows))
        tokens = [row for one in formats for row in row_tokens(tokenizer, rows, one)]
        check_vocabulary(model, [(*row.prompt, *row.response) for row in tokens])
        check_lengths(
            model, [row.prompt for row in tokens], settings.first_tokens or max(len(r.response) for r in tokens)
        )
        return tokens, f"{len(tokens)} rows, as they were given"
    names = PACKAGED if settings.prompts is None else settings.prompts
    sets = all_or_none(lambda: [load_prompts(name, settings.num_prompts, settings.seed) for name in names])
    how: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "label": "replay: harvest" if bars else None}
    harvests = [harvest(model, tokenizer, sets, row_format=one, **how) for one in formats]
    return [row for one in harvests for row in one.tokens], "; ".join(map(str, harvests))


def row_losses(
    model: nn.Module, rows: Sequence[RowTokens], reference: Reference | None, which: Sequence[int], loss: RowLoss
) -> Tensor:
    """Return the loss of the live model on the rows `which`, (n,), float32: one forward pass, with gradients."""
    device = next(model.parameters()).device
    batch = row_batch([rows[row] for row in which], device)
    there = None if reference is None else reference.rows(which, device)
    return loss.function(row_outputs(model, batch, hidden=loss.hidden), batch, there)


@dataclass(frozen=True)
class ReplayRows:
    """Safety rows with what the reference says of them, and the order in which they come; made by `replay_rows`.

    `words` says in a sentence which they are. `floor`: the loss above which a row counts, None where all of it does.
    Where neither the loss nor the settings compare with it, the reference is None.
    """

    tokens: tuple[RowTokens, ...]
    reference: Reference | None
    row_loss: RowLoss
    order: RowOrder
    batch_size: int
    weight: float
    floor: float | None
    words: str

    def next_losses(self, model: nn.Module) -> tuple[Tensor, list[str]]:
        """Return the losses (n,) of this rank's next rows, with gradients, and each row's kind."""
        which = self.order.draw(self.batch_size, rank(), world_size())
        losses = row_losses(model, self.tokens, self.reference, which, self.row_loss)
        return losses, [self.tokens[row].kind for row in which]

    def mean(self, losses: Tensor) -> Tensor:
        """Return the mean of what counts of the losses."""
        return (losses if self.floor is None else (losses - self.floor).relu()).mean()

    def loss(self, model: nn.Module) -> Tensor:
        """Return `weight` times the loss of the next rows, to be added to the task's: for a loop of one's own."""
        return self.weight * self.mean(self.next_losses(model)[0])


def replay_rows(
    model: nn.Module, tokenizer: Any, settings: ReplaySettings | None = None, *, bars: bool = True
) -> ReplayRows:
    """Return the rows that the settings name, with the reference: the model itself, its adapter off.

    Costs the answers to the prompts, unless they are in the cache, and a forward pass a row where anything compares
    with the reference; with `bars`, each draws a progress bar on the first rank. The model is left as it was.
    Collective. Raises ConfigError for a model without an adapter, that predicts no next tokens, or that is not aligned,
    and as `safety_rows`.
    """
    settings = settings or ReplaySettings()
    _check_predicts(model)
    loss = LOSSES[settings.loss]
    with adapter_off(model):
        rows, words = safety_rows(model, tokenizer, settings, bars=bars)
        tokens = tuple(shortened(row, settings.first_tokens) for row in rows)
        reference = _reference(model, tokens, settings, bars=bars)
    if reference is not None and settings.top_k is not None and loss.log_probs:
        mean, most = reference.rest_mass
        words += f"; beside the {settings.top_k} likeliest tokens {mean:.2g} of the probability, {most:.2g} at most"
    floor = None if reference is None or settings.hinge is None else loss.limit(reference, settings.hinge)
    order = row_order([row.kind for row in tokens], settings.seed, settings.harmful_share)
    return ReplayRows(tokens, reference, loss, order, settings.batch_size, settings.weight, floor, words)


def _reference(
    model: nn.Module, tokens: Sequence[RowTokens], settings: ReplaySettings, *, bars: bool
) -> Reference | None:
    """What the loss reads of the model as it is now, and its own losses; None where nothing compares with it."""
    loss = LOSSES[settings.loss]
    if not (loss.compares or settings.by_need or settings.hinge is not None):
        return None
    label = "replay: reference" if bars and rank() == 0 else None
    top_k = settings.top_k if loss.log_probs else 0
    return take_reference(model, tokens, top_k=top_k, hidden=loss.hidden, label=label)


def _check_predicts(model: Any) -> None:
    """Raise ConfigError for a model that says nothing after a prompt: a classifier, or an encoder with a decoder."""
    generates = getattr(model, "can_generate", None)
    if getattr(model.config, "is_encoder_decoder", False) or (generates is not None and not generates()):
        raise ConfigError(
            f"replay holds what a model says next, and {model.config.model_type!r} as it is loaded here is no decoder "
            "with a language head: load it with AutoModelForCausalLM, or leave replay out"
        )


def rows_of_run(name: str, settings: ReplaySettings, start: RunStart) -> ReplayRows:
    """Return the rows of correction `name` for the run that begins, and say which they are. Collective.

    Raises as `replay_rows`, and ConfigError without a tokenizer.
    """
    rows = replay_rows(start.model, tokenizer_of(name, start), settings, bars=start.bars)
    start.say(f"{name}: {rows.words}")
    return rows


@dataclass
class KindLosses:
    """The losses by kind since they were last told, on the device, and how many rows that were."""

    total: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, kinds: Sequence[str], losses: Tensor) -> None:
        """Take the losses (n,) of rows of these kinds in."""
        for kind, loss in zip(kinds, losses, strict=True):
            self.total[kind] = self.total.get(kind, torch.zeros_like(loss)) + loss
            self.rows[kind] = self.rows.get(kind, 0) + 1

    def take(self) -> dict[str, float]:
        """Return the mean by kind over the ranks, and how many rows all of them had; begin anew. Collective."""
        shares = everyones({kind: (float(total), self.rows[kind]) for kind, total in self.total.items()})
        self.total.clear()
        self.rows.clear()
        by_kind = {kind: [share[kind] for share in shares if kind in share] for kind in sorted(set().union(*shares))}
        rows = {kind: sum(count for _, count in one) for kind, one in by_kind.items()}
        means = {f"loss_{kind}": sum(total for total, _ in one) / rows[kind] for kind, one in by_kind.items()}
        return {**means, "rows": float(sum(rows.values()))}


class Replay:
    """The gradient term; `prepare` gets the rows and the reference, at the cost of answering and one pass a row.

    `name`: what the correction is called whose rows these are.
    """

    noun = "place in the safety rows"

    def __init__(self, settings: ReplaySettings, name: str = REPLAY) -> None:
        self.settings, self.name = settings, name
        self.weight = settings.weight
        self.schedule = Pace(settings, settings.by_need, settings.longest, settings.max_share)
        self.need = Need(settings.tolerance)
        self.spreads: Mapping[str, tuple[float, float]] = {}
        self.losses = KindLosses()
        self.latest: tuple[Sequence[str], Tensor] | None = None
        self.began = 0.0
        self.max_steps = 0

    @property
    def row_tokens(self) -> tuple[RowTokens, ...]:
        """The rows, once it is prepared."""
        return self.rows.tokens

    def prepare(self, start: RunStart) -> None:
        """Get the rows and the reference. Collective. Raises as `replay_rows`, and without a tokenizer."""
        self.rows = rows_of_run(self.name, self.settings, start)
        if self.settings.by_need and self.rows.reference is not None:
            kinds = [row.kind for row in self.rows.tokens]
            self.spreads = spreads_by_kind(self.rows.reference, kinds, self.rows.row_loss)
        self.schedule.clock = partial(settled, next(start.model.parameters()).device)

    def loss(self, at: RunPoint, model: nn.Module) -> Tensor:
        """Return the mean loss of this rank's next rows."""
        self.began, self.max_steps = self.schedule.begin(), at.max_steps
        losses, kinds = self.rows.next_losses(model)
        self.latest = kinds, losses.detach()
        return self.rows.mean(losses)

    def observe(self, step: int, loss: float) -> None:
        """Take note of the rows' losses: whether they are needed soon again. Collective."""
        if self.latest is not None:
            self.losses.add(*self.latest)
        needed = not self.settings.by_need or self.need.observe(self._rise())
        if self.schedule.end(step, self.max_steps, self.began, needed=needed):
            self._tell_dear(step)

    def _rise(self) -> float:
        """The latest rows' rise over the ranks, NaN where one of them has none. Collective."""
        if self.latest is None:
            return mean_over_ranks(math.nan, torch.device("cpu"))
        kinds, losses = self.latest
        return mean_over_ranks(mean_rise(losses, kinds, self.spreads), losses.device)

    def _tell_dear(self, step: int) -> None:
        """Warn where the passes take a large share of the training, once they are measured, and say what lowers it."""
        share = self.schedule.dear(step, self.max_steps)
        if share is not None and rank() == 0:
            every = self.schedule.spacing(self.max_steps)
            warnings.warn(
                f"safemerge: {self.name} takes {share:.0%} of the training's time, coming every {every} of its steps, "
                f"as measured until step {step}: let it come more seldom (every: {2 * every}), or give replay the "
                "share that it may take (max_share: 0.15; when it comes then depends on the machine's pace)",
                stacklevel=2,
            )

    def figures(self) -> Mapping[str, float]:
        """Return mean losses by kind and the rows since they were last told, and the interval in force. Collective."""
        return {**self.losses.take(), "interval": float(self.schedule.spacing(self.max_steps))}

    def after_step(self, at: RunPoint) -> None:
        """Nothing follows a step: what is kept moves when rows are drawn."""

    def save(self, folder: Path, save: str) -> None:
        """Write where the order of the rows and the pace stand. Raises OSError."""
        place = {"drawn": self.rows.order.drawn, "ranks": world_size(), "recent": self.need.recent}
        state = {**place, **self.schedule.state()}
        write_state(folder / state_file(self.name), save, state)

    def load(self, folders: Sequence[Path], save: str | None) -> bool:
        """Go on from there; as `Kept.load`."""
        where, loss = state_file(self.name), "which safety rows come next"
        state = from_first(all_or_none(lambda: read_state(folders, where, save, _place, loss) if rank() == 0 else None))
        if state is None:
            return False
        self.rows.order.drawn = state["drawn"]
        if state["ranks"] != world_size():
            warnings.warn(
                f"safemerge: the checkpoint is of {state['ranks']} processes and there are {world_size()} now: "
                f"{self.name} goes on with the next of its rows, {self.settings.batch_size} a process",
                stacklevel=2,
            )
        pace = self.schedule
        pace.factor, pace.least, pace.next_step = state["factor"], state["least"], state["next_step"]
        pace.measured = state["measured"]
        self.need.recent = state["recent"]
        return True

    def rewind(self, folders: Sequence[Path], save: str | None) -> None:
        """The weights are an earlier step's again; the rows go on from where they are."""


class ReplayApart(Replay):
    """Replay whose gradient is kept apart from the task's until both are known."""

    def combine(self, task: Sequence[Tensor], safety: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient that the optimizer gets."""
        share = self.settings.max_norm
        added = list(safety) if share is None else bounded(safety, task, share)
        kept = without_conflict(task, safety) if self.settings.surgery else task
        return [g + h for g, h in zip(kept, added, strict=True)]


@correction(
    ReplaySettings,
    cost="one forward and backward pass of batch_size short rows a step",
    deed="safety rows were replayed",
    figures=FIGURES,
)
def replay(settings: ReplaySettings) -> Replay:
    """Return the term of one run."""
    apart = settings.surgery or settings.max_norm is not None
    return ReplayApart(settings) if apart else Replay(settings)


def shortened(row: RowTokens, first_tokens: int | None) -> RowTokens:
    """Return the row with only the first tokens of its response."""
    return row if first_tokens is None else row._replace(response=row.response[:first_tokens])


def state_file(name: str) -> str:
    """Return the name of the file in which a checkpoint holds where the rows of a correction stand."""
    return f"safemerge_{name}.json"


def _place(state: Mapping[str, Any]) -> dict[str, Any]:
    """Where the rows and the pace stand; ValueError and KeyError for what is no such state."""
    counts = {name: state[name] for name in ("drawn", "ranks", *Pace(Schedule()).state())}
    if bad := [name for name, value in counts.items() if name != "measured" and not is_whole(value, 0)]:
        raise ValueError(f"{bad[0]} is {shown(counts[bad[0]])}")
    # Checkpoints from before rows' rises were kept have none.
    return {**counts, "recent": [float(rise) for rise in state.get("recent", ())]}
