"""Which safety rows a correction takes, as its settings say it; the same for all that take any."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, shown
from ..evaluation.prompts import check_prompt_set
from ..evaluation.rows import load_table
from ..io.numbers import is_number, is_whole
from ..signals.rows import row_formats
from .protocol import RunStart
from .schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class RowSource(Schedule):
    """Safety rows, and when they are due; ConfigError for what cannot be.

    `prompts` (names of prompt sets, or `harm:FILE` and `benign:FILE`; by default the packaged ones), of each set
    at most `num_prompts`, are answered by the aligned model itself when the run begins, in at most `max_new_tokens`;
    or `rows`, prompts with responses, in a file, on the Hub, or a list. `in_format`: the system prompt and the words
    around each prompt, as {system: ..., template: "... {prompt} ..."}, or a list of such, {} for none: rows come in
    each. `batch_size` of them come a time and rank, in an order that `seed` and the pass over them decide.
    `harmful_share`: how many of those that come are harmful; None: as many as there are.
    """

    rows: Any = field(default=None, metadata={"counted": True})
    prompts: Any = None
    num_prompts: int = 64
    max_new_tokens: int = 24
    in_format: Any = None
    batch_size: int = 1
    harmful_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prompts", "max_new_tokens", "batch_size"):
            check_count(name, getattr(self, name))
        share = self.harmful_share
        if share is not None and (not is_number(share) or not 0 <= share <= 1):
            raise ConfigError(f"harmful_share is {shown(share)}: give a share of the rows, 0 to 1, or leave it out")
        if not is_whole(self.seed):
            raise ConfigError(f"seed is {shown(self.seed)}: give a whole number")
        if self.rows is not None and self.prompts is not None:
            raise ConfigError("rows and prompts are both given: give prompts to be answered, or rows with responses")
        row_formats(self.in_format)
        object.__setattr__(self, "rows", plain_rows(self.rows))
        self._check_prompts()

    def _check_prompts(self) -> None:
        names = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        if names is None:
            return
        if not isinstance(names, list | tuple) or not names:
            raise ConfigError(f"prompts is {shown(names)}: give names of prompt sets, or harm:FILE and benign:FILE")
        kinds = {check_prompt_set(name) for name in names}
        if len(kinds) < 2:
            raise ConfigError(
                f"prompts {shown(names)} are of one kind alone, {kinds.pop()}: add some of the other, or a model "
                "learns to refuse all or nothing"
            )
        object.__setattr__(self, "prompts", list(names))

    def of_source(self) -> dict[str, Any]:
        """Return what is set here, schedule and rows, as keywords of another's settings."""
        return {name: getattr(self, name) for name in RowSource.__dataclass_fields__}


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError for what is no number of things."""
    if not is_whole(value, 1):
        raise ConfigError(f"{name} is {shown(value)}: give a whole number of 1 or more")


def plain_rows(rows: Any) -> str | list[Any] | None:
    """Return a setting `rows` as YAML could hold it: a place, or a list; ConfigError for what is neither."""
    if rows is None or isinstance(rows, str):
        return rows
    return str(rows) if isinstance(rows, Path) else list(load_table(rows, "safety rows")[1])


def tokenizer_of(name: str, start: RunStart) -> Any:
    """Return the run's tokenizer; ConfigError where there is none for the rows of correction `name`."""
    if start.tokenizer is None:
        raise ConfigError(
            f"{name} asks the model in words, and this trainer has no tokenizer: give it one (processing_class=)"
        )
    return start.tokenizer
