"""Safety rows: prompts with the responses that a model is to keep giving; as text, and as the tokens of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from ..errors import ConfigError, shown
from ..io.choices import truth
from ..io.texts import check_whole
from .chat import PLACE, has_template, inherited, questions, rendered, shows, template_settings, text_part
from .responses import tokenized

# What a safe model does with a prompt: it refuses "harm", and answers "benign".
Kind = Literal["harm", "benign"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HARM, BENIGN = KINDS


@dataclass(frozen=True)
class SafetyRow:
    """A prompt, the response to keep, and which of the two kinds it is; `system`: the system prompt before it."""

    prompt: str
    response: str
    kind: Kind
    system: str | None = None


class RowTokens(NamedTuple):
    """A row as token ids: the prompt up to where the model's own turn begins, and the beginning of the response.

    `kind` is `task` for a row that a run was trained on, which is neither of the two kinds.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    kind: Kind | Literal["task"]


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
        if self.system is not None and not isinstance(self.system, str):
            raise ConfigError(f"row format: system is {shown(self.system)}: give a text, or leave it out")
        check_whole(self.system or "", "row format: system")
        truth(self.chat, "row format: chat")
        if not isinstance(self.template, str) or self.template.count(PLACE) != 1:
            raise ConfigError(
                f"row format: template {shown(self.template)} must hold {PLACE} once, where a prompt goes"
            )
        check_whole(self.template, "row format: template")
        if self.system and not self.chat:
            raise ConfigError(
                f"row format: system {shown(self.system)} has no place without the chat template: write it into "
                "`template`"
            )

    def wrapped(self, prompt: str) -> str:
        """Return a prompt with the wrapper around it."""
        return self.template.replace(PLACE, prompt)


PLAIN = RowFormat()


def row_formats(in_format: Any) -> list[RowFormat]:
    """Return the formats of a setting: one, or one after the other; ConfigError for what is none."""
    formats = in_format if isinstance(in_format, list | tuple) else [in_format]
    return [_row_format(one) for one in formats] or [RowFormat()]


def _row_format(one: Any) -> RowFormat:
    if one is None or isinstance(one, RowFormat):
        return one or RowFormat()
    allowed = [each.name for each in fields(RowFormat)]
    if not isinstance(one, Mapping) or not set(one) <= set(allowed):
        raise ConfigError(f"in_format is {shown(one)}: give a mapping of some of {allowed}, or a list of such")
    return RowFormat(**one)


def prompt_tokens(
    tokenizer: Any,
    prompts: Sequence[str],
    row_format: RowFormat = PLAIN,
    settings: Mapping[str, Any] | str | None = None,
) -> list[list[int]]:
    """Return the token ids of each prompt in a format, up to where the model's own turn begins.

    `settings` go to the chat template. ConfigError as `tokenized`.
    """
    if row_format.chat and not has_template(tokenizer, settings):
        raise ConfigError(
            "the tokenizer has no chat template, in which a prompt would be put to the model: take a chat or instruct "
            "model, or set tokenizer.chat_template to the one that its family uses"
        )
    if not row_format.chat:
        return tokenized(tokenizer, prompts, row_format.template, settings)
    texts = [row_format.wrapped(prompt) for prompt in prompts]
    return tokenized(tokenizer, texts, settings=settings, system=row_format.system)


def row_tokens(
    tokenizer: Any,
    rows: Sequence[SafetyRow],
    row_format: RowFormat = PLAIN,
    *,
    first_tokens: int | None = None,
    settings: Mapping[str, Any] | str | None = None,
) -> tuple[RowTokens, ...]:
    """Return rows as token ids in a format, in their order; of the response the first `first_tokens` (None: all).

    The response is written as the chat template writes the model's turn, up to the special token that ends it. A row's
    own system prompt takes the place of the format's. ConfigError as `prompt_tokens`, and where the template loses a
    response, or a row has a system prompt and the format no chat template.
    """
    tokens: dict[int, RowTokens] = {}
    for system in dict.fromkeys(row.system for row in rows):
        places = [i for i, row in enumerate(rows) if row.system == system]
        group_format = row_format if system is None else replace(row_format, system=system)
        group = [rows[i] for i in places]
        prompts = prompt_tokens(tokenizer, [row.prompt for row in group], group_format, settings)
        responses = _responses(tokenizer, group, group_format, template_settings(settings))
        for i, row, prompt, response in zip(places, group, prompts, responses, strict=True):
            tokens[i] = RowTokens(tuple(prompt), tuple(response[:first_tokens]), row.kind)
    return tuple(tokens[i] for i in range(len(rows)))


def _responses(
    tokenizer: Any, rows: Sequence[SafetyRow], row_format: RowFormat, settings: Mapping[str, Any]
) -> list[list[int]]:
    text = text_part(tokenizer)
    if not row_format.chat:
        # What follows a wrapper such as "Answer:" is a word of its own.
        blank = "" if row_format.template[-1:].isspace() or row_format.template.endswith(PLACE) else " "
        return [_ended(text, f"{blank}{row.response}") for row in rows]
    settings = {**inherited(tokenizer), **settings}
    begun = questions(text, [row_format.wrapped(row.prompt) for row in rows], settings, row_format.system)
    return [_turn(text, row, prompt, row_format, settings) for row, prompt in zip(rows, begun, strict=True)]


def _turn(tokenizer: Any, row: SafetyRow, begun: str, row_format: RowFormat, settings: Mapping[str, Any]) -> list[int]:
    """The model's turn, as the template goes on after `begun`."""
    turns = [("system", row_format.system)] if row_format.system else []
    turns += [("user", row_format.wrapped(row.prompt)), ("assistant", row.response)]
    whole = rendered(tokenizer, turns, **settings)
    if not shows(whole, row.response):
        raise ConfigError(
            f"the chat template loses the response {shown(row.response)}: set tokenizer.chat_template to one that "
            "shows the assistant's turn"
        )
    # Some templates write a turn that is over otherwise than one that begins: a thought is opened, and later left out.
    goes_on = whole.startswith(begun) and shows(whole[len(begun) :], row.response)
    return _ended(tokenizer, whole[len(begun) :] if goes_on else row.response)


def _ended(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a response up to the last special one, which ends the turn; the tokenizer's own where none does."""
    check_whole(text, "a response")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, one in tokenizer.added_tokens_decoder.items() if one.special)}
    ends = [at for at, token in enumerate(ids) if token in special]
    if ends:
        return ids[: ends[-1] + 1]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
