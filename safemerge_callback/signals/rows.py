"""Safety rows: prompts with the responses that a model is to keep giving; as text, and as the tokens of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

# What a safe model does with a prompt: it refuses "harm", and answers "benign".
Kind = Literal["harm", "benign"]


@dataclass(frozen=True)
class SafetyRow:
    """A prompt, the response to keep, and which of the two kinds it is; `system`: the system prompt before it."""

    prompt: str
    response: str
    kind: Kind
    system: str | None = None


class RowTokens(NamedTuple):
    """A row as token ids: the prompt up to where the model's own turn begins, and the beginning of the response."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    kind: Kind
