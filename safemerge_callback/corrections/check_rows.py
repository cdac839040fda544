"""The rows that a check asks a live model about: which they are, and the safety rows, shared with a replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ..errors import ConfigError, nearest, shown
from ..io.numbers import is_whole
from ..signals.adapter_off import adapter_off
from ..signals.rows import RowTokens
from .replay import ReplaySettings, safety_rows, shortened


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What the setting `data` holds: the rows for gates, methods and weights rules that ask a live model.

    Safety rows: `safety_rows`, prompts with responses, in a file, on the Hub, or a list; or `prompts` (names of prompt
    sets, or `harm:FILE` and `benign:FILE`), of each set at most `num_prompts`, which the aligned model answers itself.
    Where neither is named they are those of a `replay` beside, or else answers to the packaged prompts. Of each
    response `first_tokens` count (None: all). `num_task_rows`: how many of the rows that were trained on last are kept,
    over all processes; `gram_rows`: at how many positions of each kind inputs are kept for Grams. ConfigError for what
    cannot be.
    """

    safety_rows: Any = None
    prompts: Any = None
    num_prompts: int = 64
    first_tokens: int | None = 8
    num_task_rows: int = 64
    gram_rows: int = 128

    def __post_init__(self) -> None:
        # Checked where rows, prompts and their numbers are.
        settled = self.as_replay
        object.__setattr__(self, "safety_rows", settled.rows)
        object.__setattr__(self, "prompts", settled.prompts)
        for name in ("num_task_rows", "gram_rows"):
            if not is_whole(getattr(self, name), 1):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}: give a whole number of 1 or more")

    @property
    def as_replay(self) -> ReplaySettings:
        """The same rows as `replay` names them."""
        return ReplaySettings(
            rows=self.safety_rows,
            prompts=self.prompts,
            num_prompts=self.num_prompts,
            first_tokens=self.first_tokens,
        )

    @classmethod
    def of(cls, values: Any) -> RowSettings:
        """Make them of the setting's mapping; ConfigError for anything else, with the nearest name that there is."""
        if values is None:
            return cls()
        allowed = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping):
            raise ConfigError(f"data is {shown(values)}: give a mapping of some of {allowed}, or leave it out")
        for key in values:
            if key not in allowed:
                raise ConfigError(
                    f"data: setting {shown(key)} is unknown{nearest(str(key), allowed, then=f'choose among {allowed}')}"
                )
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"data: {error}") from error


@runtime_checkable
class RowHolder(Protocol):
    """A correction with safety rows that others of its run may ask about, once it is prepared."""

    @property
    def row_tokens(self) -> tuple[RowTokens, ...]:
        """The rows, as tokens of the run's model."""


def safety_batch(
    model: nn.Module,
    tokenizer: Any,
    settings: RowSettings,
    corrections: Iterable[object],
    who: str,
    *,
    bars: bool = False,
) -> tuple[tuple[RowTokens, ...], str]:
    """Return the safety rows of a run and a sentence on them; those of a correction that has some are not made again.

    `who` needs them, in words; with `bars` answering draws a progress bar. The aligned model is the same one with its
    adapter off. Collective. ConfigError without a tokenizer, where no row is harmful, and as `safety_rows`.
    """
    holder = next((one for one in corrections if isinstance(one, RowHolder)), None)
    if holder is not None and settings.safety_rows is None and settings.prompts is None:
        rows, words = holder.row_tokens, "those of the correction beside"
    elif tokenizer is None:
        raise ConfigError(
            f"{who} asks the model in words, and this trainer has no tokenizer: give it one (processing_class=)"
        )
    else:
        rows, words = _answers(model, tokenizer, settings, who, bars=bars)
    if not any(row.kind == "harm" for row in rows):
        raise ConfigError(
            f"{who} needs safety rows that are refused, and none of {len(rows)} is harmful: add such to data: "
            "safety_rows"
        )
    return rows, words


def _answers(
    model: nn.Module, tokenizer: Any, settings: RowSettings, who: str, *, bars: bool
) -> tuple[tuple[RowTokens, ...], str]:
    try:
        with adapter_off(model):
            rows, words = safety_rows(model, tokenizer, settings.as_replay, bars=bars)
    except ConfigError as error:
        raise ConfigError(f"{who} needs safety rows: {error}") from error
    return tuple(shortened(row, settings.first_tokens) for row in rows), words
