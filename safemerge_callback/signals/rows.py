"""Safety rows: prompts with the responses that a model is to keep giving; as text, and as the tokens of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..errors import ConfigError, shown
from .chat import PLACE
from .responses import tokenized

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


@dataclass(frozen=True)
class RowFormat:
    """In which words a prompt is put to the model: a system prompt before it, and a wrapper around it.

    `template` holds `{prompt}` once, such as "Answer in one word.\\n\\n{prompt}". With `chat` it is the text of a
    user's turn in the chat template; without, it is all that the model reads, and there is no system prompt.
    ConfigError for anything else.
    """

    system: str | None = None
    template: str = PLACE
    chat: bool = True

    def __post_init__(self) -> None:
        if self.template.count(PLACE) != 1:
            raise ConfigError(
                f"row format: template {shown(self.template)} must hold {PLACE} once, where a prompt goes"
            )
        if self.system and not self.chat:
            raise ConfigError(
                f"row format: system {shown(self.system)} has no place without the chat template: write it into "
                "`template`"
            )

    def wrapped(self, prompt: str) -> str:
        """Return a prompt with the wrapper around it."""
        return self.template.replace(PLACE, prompt)


PLAIN = RowFormat()


def prompt_tokens(
    tokenizer: Any,
    prompts: Sequence[str],
    row_format: RowFormat = PLAIN,
    settings: Mapping[str, Any] | str | None = None,
) -> list[list[int]]:
    """Return the token ids of each prompt in a format, up to where the model's own turn begins.

    `settings` go to the chat template. ConfigError as `tokenized`.
    """
    if not row_format.chat:
        return tokenized(tokenizer, prompts, row_format.template, settings)
    texts = [row_format.wrapped(prompt) for prompt in prompts]
    return tokenized(tokenizer, texts, settings=settings, system=row_format.system)
