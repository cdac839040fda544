"""Turns as a chat template writes them, and the proof that the model is really asked what it is meant to be asked."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, shown
from ..io.documents import parse_json

PLACE = "{prompt}"
# Asked beside the prompts: a short prompt may stand in the template's own words by chance.
_MARK = "harmless question 7261"
_LIST = re.compile(r"""["']type["']\s*:\s*["']text["']""")
# What this package says itself when it renders; and what apply_chat_template reads, not the template.
_OURS = (
    *("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"),
    *("return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs"),
)
_ARGUMENTS = ("chat_template", "tools", "documents")


def rendered(tokenizer: Any, turns: Sequence[tuple[str, str]], **settings: Any) -> str:
    """Return turns, each a role and a text, as the chat template writes them.

    Some templates take a content as text, others only as a list of parts (vision-language models): whichever shows
    every text is used, else whichever can be written at all. Raises what the template raises for a text where it can
    write neither.
    """
    texts: list[str] = []
    faults: list[Exception] = []
    for content in (_plain, _parts):
        try:
            messages = [{"role": role, "content": content(said)} for role, said in turns]
            text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except Exception as error:
            # A template is a program of its own, and raises whatever it likes.
            faults.append(error)
            continue
        if content is _parts and _LIST.search(text):
            # The list itself, printed: this template takes texts.
            continue
        if all(shows(text, said) for _, said in turns):
            return text
        texts.append(text)
    if not texts:
        raise faults[0]
    return texts[0]


def shows(text: str, said: str) -> bool:
    """Whether `said` stands in a text, whatever became of blanks and capitals, or escaped for JSON or HTML."""
    escaped = json.dumps(said.strip(), ensure_ascii=False)[1:-1]
    return escaped in text or any(_bare(said) in _bare(written) for written in (text, html.unescape(text)))


def _bare(text: str) -> str:
    return " ".join(text.split()).casefold()


def questions(
    tokenizer: Any, prompts: Sequence[str], settings: Mapping[str, Any], system: str | None = None
) -> list[str]:
    """Return each prompt as a user's turn in the chat template, up to where the model's own turn begins.

    `settings` go to the template; `system` is a system prompt before the turn. ConfigError where there is no template,
    where it refuses such turns, does not read a setting, or where a text does not stand in what it writes: the model
    would be asked something else.
    """
    if not has_template(tokenizer, settings):
        raise ConfigError(
            "the tokenizer has no chat template: take a chat or instruct model, set tokenizer.chat_template, or give "
            f"`template`, the words around a prompt, such as 'Question: {PLACE}\\nAnswer:'"
        )
    before = [("system", system)] if system else []
    try:
        _check_read(tokenizer, settings)
        mark, *texts = (
            rendered(tokenizer, [*before, ("user", prompt)], add_generation_prompt=True, **settings)
            for prompt in (_MARK, *prompts)
        )
    except ConfigError:
        raise
    except Exception as error:
        if system:
            raise _no_system(system, f"cannot write ({type(error).__name__}: {error})") from error
        raise ConfigError(
            f"the chat template cannot write a lone user's turn ({type(error).__name__}: {error}): set "
            "tokenizer.chat_template to one that can, or give `template`, the words around a prompt"
        ) from error
    lost = [place for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)) if not shows(text, prompt)]
    if lost or not shows(mark, _MARK):
        which = f"prompt {lost[0] + 1} of {len(prompts)}" if lost else "the prompt"
        raise ConfigError(
            f"the chat template loses {which}, given as text and given as parts (it writes {mark[:200]!r} for "
            f"{_MARK!r}), so the model would never be asked it: set tokenizer.chat_template to one that shows the "
            "user's turn, or give `template`, the words around a prompt"
        )
    if system and not shows(mark, system):
        raise _no_system(system, "loses")
    return texts


def _no_system(system: str, does: str) -> ConfigError:
    return ConfigError(
        f"the system prompt {shown(system)} is one that the chat template {does}: set tokenizer.chat_template to one "
        "that shows a system's turn, write the words into the user's turn, or leave the system prompt out"
    )


def has_template(processing: Any, kwargs: Mapping[str, Any] | str | None = None) -> bool:
    """Whether a tokenizer or a processor has a chat template, or `chat_template_kwargs` bring one."""
    template = getattr(text_part(processing), "chat_template", None) or inherited(processing)
    return bool(template) or "chat_template" in template_settings(kwargs)


def template_settings(kwargs: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Return `chat_template_kwargs` as a dict, from a mapping or its JSON, or empty; ConfigError for anything else."""
    what, settings = "chat_template_kwargs", kwargs
    if isinstance(kwargs, str):
        settings = parse_json(kwargs, f"{what} {shown(kwargs)}", advice='Give such as {"enable_thinking": false}')
    if settings is None:
        return {}
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise ConfigError(
            f"{what} is {shown(kwargs)}: give a mapping of what the chat template reads, such as "
            "{'enable_thinking': False}"
        )
    ours = [name for name in settings if name in _OURS]
    if ours:
        raise ConfigError(f"{what} has {ours[0]!r}, which is set by whoever asks: leave it out")
    return dict(settings)


def check_tokens_differ(prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError where different prompts are all the same tokens: the model could not tell them apart."""
    different = len({" ".join(prompt.split()).casefold() for prompt in prompts}) > 1
    if different and len({tuple(ids) for ids in tokens}) == 1:
        raise ConfigError(
            f"the tokenizer makes the same {len(tokens[0])} tokens of all {len(prompts)} prompts: give the tokenizer "
            "of this model"
        )


def text_part(processing: Any) -> Any:
    """Return the tokenizer of a processor (vision-language models have one), or what was given."""
    inner = getattr(processing, "tokenizer", None)
    return inner if hasattr(inner, "apply_chat_template") else processing


def inherited(processing: Any) -> dict[str, Any]:
    """Return the template of a processor whose tokenizer has none, as a setting; empty for everything else."""
    template = getattr(processing, "chat_template", None)
    if not template or getattr(text_part(processing), "chat_template", None):
        return {}
    return {"chat_template": template["default"] if isinstance(template, Mapping) else template}


def _plain(said: str) -> Any:
    return said


def _parts(said: str) -> Any:
    return [{"type": "text", "text": said}]


def _check_read(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """Refuse what the template never reads: transformers passes it on without a word, and it does nothing."""
    named = {name: value for name, value in settings.items() if name not in _ARGUMENTS}
    if not named or not hasattr(tokenizer, "get_chat_template"):
        return
    template = tokenizer.get_chat_template(settings.get("chat_template"), settings.get("tools"))
    for name in named:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(
                f"chat_template_kwargs has {name!r}, which the chat template never reads: leave it out, or correct its "
                "name"
            )
