"""What a merge of files asks the model about: the fine-tuned adapter on its base, and rows that come from two files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from ..adapters import Adapter
from ..decision import Choices, Readings, needs_of
from ..errors import ConfigError
from ..evaluation.harvest import check_lengths
from ..evaluation.loading import load_subject
from ..evaluation.rows import load_rows
from ..ops import Grams
from ..signals.adapter_off import adapter_off
from ..signals.check_data import GRAMS, SAFETY_BATCH, TASK_BATCH, CheckData
from ..signals.module_signals import data_among, signals_among
from ..signals.responses import check_vocabulary
from ..signals.row_inputs import row_inputs
from ..signals.rows import RowTokens, row_tokens

# Of a safety row's response as many tokens count as in a training; positions of each kind that make a Gram.
FIRST_TOKENS, GRAM_ROWS = 8, 1024


class ModelRows(NamedTuple):
    """The rows to ask about, as `load_rows` takes them, and the base model: None is what the adapter's config names."""

    task_rows: Any = None
    safety_rows: Any = None
    base: str | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Those that are there."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def check_rows(choices: Choices, rows: ModelRows) -> None:
    """Raise ConfigError where rows are missing that somebody asks the model about, and where nobody asks."""
    needs = needs_of(choices.how, choices.gate, choices.rules)
    data = data_among(needs)
    wanted = {
        "safety_rows": data.get(SAFETY_BATCH),
        "task_rows": data.get(TASK_BATCH) or data.get(GRAMS),
    }
    for name, who in wanted.items():
        if who is not None and getattr(rows, name) is None:
            raise ConfigError(
                f"{who} asks the model about rows, and {name} is missing: give a file of prompts with responses "
                "(.jsonl, .csv, .json), or use it in training"
            )
    if idle := [name for name in rows.named if not data]:
        raise ConfigError(f"{idle[0]} is given, and neither gate, method nor rules ask the model: leave it out")


def check_data(
    task: Adapter, safety: Sequence[Adapter], choices: Choices, rows: ModelRows, device: Any = None
) -> CheckData | None:
    """Return what may be asked, None where nobody asks: the base is loaded, the adapter on it, and the rows read.

    The Grams are of all tokens of the task's rows with the adapter on, and from each harmful prompt's end on in the
    model without it. Raises ConfigError as `load_subject` and `load_rows`, and where no safety row is harmful.
    """
    needs = needs_of(choices.how, choices.gate, choices.rules)
    data = data_among(needs)
    if not data:
        return None
    if task.folder is None:
        raise ConfigError("an adapter in memory has no model to be asked: give its folder or Hub id")
    subject = load_subject(str(task.source), base=rows.base, device=None if device is None else str(device))
    model, tokenizer = subject.model, subject.tokenizer
    safety_rows = _tokens(model, tokenizer, rows.safety_rows, FIRST_TOKENS)
    task_rows = tuple(row._replace(kind="task") for row in _tokens(model, tokenizer, rows.task_rows, None))
    if SAFETY_BATCH in data and not any(row.kind == "harm" for row in safety_rows):
        raise ConfigError(f"safety_rows: none of {len(safety_rows)} rows is harmful: add some that are refused")
    knobs = {**choices.how.taken, **choices.gate.reads, **choices.rules}
    about = CheckData(model, safety_rows, task_rows, task.factors, safety, knobs)
    return replace(about, grams=_grams(about)) if GRAMS in data else about


def with_signals(readings: Readings, data: CheckData | None, choices: Choices) -> Readings:
    """Return the readings with what the model says of their modules."""
    if data is None:
        return readings
    signals = signals_among(needs_of(choices.how, choices.gate, choices.rules))
    return readings.with_signals({signal.name: dict(signal.function(data)) for signal in signals})


def _tokens(model: Any, tokenizer: Any, source: Any, first_tokens: int | None) -> tuple[RowTokens, ...]:
    if source is None:
        return ()
    tokens = row_tokens(tokenizer, load_rows(source, both=False), first_tokens=first_tokens)
    check_vocabulary(model, [(*row.prompt, *row.response) for row in tokens])
    check_lengths(model, [(*row.prompt, *row.response) for row in tokens], 0)
    return tokens


def _grams(data: CheckData) -> Mapping[str, Grams]:
    task = _thinned(row_inputs(data.model, data.task_batch, whole=True))
    with adapter_off(data.model):
        safety = _thinned(row_inputs(data.model, data.harmful))
    return {name: Grams(task[name], factor) for name, factor in safety.items()}


def _thinned(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """At most so many rows, evenly drawn; modules that share a factor go on sharing it."""
    thin: dict[int, Tensor] = {}
    for factor in factors.values():
        if id(factor) not in thin:
            count = min(len(factor), GRAM_ROWS)
            places = [round(i * len(factor) / count) for i in range(count)]
            thin[id(factor)] = factor[places] * (len(factor) / count) ** 0.5
    return {name: thin[id(factor)] for name, factor in factors.items()}
