"""Harmful prompts with harmful answers, for terms that harden a model against learning them; a user gives them.

Nothing here writes such a text, and none comes with the package: rows of templated compliance, which agree and then say
nothing, are what the recipes take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, shown
from ..evaluation.harvest import check_lengths
from ..evaluation.judges import KeywordJudge
from ..evaluation.rows import load_rows
from ..io.numbers import is_whole
from ..live.ranks import all_or_none, rank, world_size
from ..signals.responses import check_vocabulary
from ..signals.row_batch import mean_of_targets, row_batch, row_outputs, target_losses
from ..signals.rows import RowTokens, SafetyRow, row_formats, row_tokens
from .protocol import RunPoint, RunStart
from .row_order import RowOrder
from .row_source import plain_rows, tokenizer_of
from .schedule import Schedule, interval

# Of harmful answers the keyword judge takes some for refusals ("I'm sorry to say that ..."); not half of them.
MOST_REFUSALS = 0.5


@dataclass(frozen=True, kw_only=True)
class HarmfulRowSettings(Schedule):
    """What a term with harmful answers reads of its entry, and its own settings besides.

    `rows`: harmful prompts, each with the answer that is not to be learned: a file (.jsonl, .csv, .json), a data set on
    the Hub, or a list, with the columns `prompt` and `response`. `in_format`: the words around each prompt, as
    `replay` takes it. `batch_size` rows a rank come at a time, in an order of `seed`; of each response the first
    `first_tokens` count (None: all).
    """

    rows: Any = field(default=None, metadata={"counted": True})
    in_format: Any = None
    first_tokens: int | None = None
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is None:
            raise ConfigError(
                "rows are missing: give harmful prompts with harmful answers, a file, a data set on the Hub, or a list "
                "with the columns prompt and response; none come with the package"
            )
        object.__setattr__(self, "rows", plain_rows(self.rows))
        row_formats(self.in_format)
        for name in ("batch_size", "first_tokens"):
            value = getattr(self, name)
            if not is_whole(value, 1) and not (value is None and name == "first_tokens"):
                raise ConfigError(f"{name} is {shown(value)}: give a whole number of 1 or more")
        if not is_whole(self.seed):
            raise ConfigError(f"seed is {shown(self.seed)}: give a whole number")


@dataclass(frozen=True)
class HarmfulRows:
    """The rows as one model's tokens, and the order in which they come; made by `harmful_rows`."""

    tokens: tuple[RowTokens, ...]
    settings: HarmfulRowSettings

    def batch(self, at: RunPoint) -> tuple[RowTokens, ...]:
        """Return this rank's rows of the step after `at`; which they are depends on nothing else, also in a resume."""
        settings, ranks = self.settings, world_size()
        times = at.step // max(interval(settings.every, at.max_steps), 1)
        order = RowOrder(len(self.tokens), settings.seed, times * settings.batch_size * ranks)
        return tuple(self.tokens[row] for row in order.draw(settings.batch_size, rank(), ranks))

    def loss(self, at: RunPoint) -> Callable[[nn.Module], Tensor]:
        """Return the loss of a model on those rows, as `mean_loss`: the same rows whenever it is called."""
        return partial(mean_loss, rows=self.batch(at))


def mean_loss(model: nn.Module, rows: Sequence[RowTokens]) -> Tensor:
    """Return the mean over rows of the mean cross-entropy of a row's response, a scalar, at least float32, in nats.

    One forward pass.
    """
    batch = row_batch(rows, next(model.parameters()).device)
    return mean_of_targets(target_losses(row_outputs(model, batch).logits, batch), batch).mean()


def harmful_rows(name: str, settings: HarmfulRowSettings, start: RunStart) -> HarmfulRows:
    """Return the rows that correction `name` was given, as tokens of the run's model. Collective.

    Raises ConfigError without a tokenizer, as `load_rows`, for rows that refuse, and for what the model cannot take.
    """
    tokenizer = tokenizer_of(name, start)
    rows = all_or_none(lambda: _answers(name, settings.rows))
    formats = row_formats(settings.in_format)
    tokens = tuple(
        row for one in formats for row in row_tokens(tokenizer, rows, one, first_tokens=settings.first_tokens)
    )
    check_vocabulary(start.model, [(*row.prompt, *row.response) for row in tokens])
    check_lengths(start.model, [row.prompt for row in tokens], max(len(row.response) for row in tokens))
    start.say(f"{name}: {len(tokens)} rows of harmful answers, as they were given")
    return HarmfulRows(tokens, settings)


def _answers(name: str, source: Any) -> tuple[SafetyRow, ...]:
    rows = load_rows(source, both=False)
    judge = KeywordJudge()
    refusals = [row for row in rows if judge.refuses(row.prompt, row.response)]
    if len(refusals) > MOST_REFUSALS * len(rows):
        raise ConfigError(
            f"{name} needs harmful answers, and {len(refusals)} of its {len(rows)} rows refuse, as "
            f"{shown(refusals[0].response)}: give rows in which the prompt is complied with, or leave {name} out; "
            "refusals are what the training data or a replay is for"
        )
    return rows
