"""The format of a training set, read off its first rows; apart from `rows`, which know a tokenizer and no columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from .chat import PLACE
from .rows import RowFormat

# Rows that are read, and different texts among them without which nothing can be called a wrapper.
_FIRST, _LEAST = 64, 4
# Where a conversation may stand, TRL's names first; the last is that of ShareGPT.
_CONVERSATIONS = ("messages", "prompt", "chosen", "conversations")
# Columns of a question and of its answer, as texts or as turns.
PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response")),
    *(("question", "answer"), ("question", "response")),
)
_ROLES = {"human": "user", "gpt": "assistant"}


class _Question(NamedTuple):
    system: str | None
    text: str
    chat: bool


def format_of(dataset: Iterable[Any]) -> RowFormat | None:
    """Return the format of a training set's prompts: their system prompt, and the words around each of them.

    Read off the first 64 rows with a conversation in `messages`, `prompt`, `chosen` or `conversations`, or a text in
    `prompt`, which is trained on without the chat template. The system prompt is the most frequent one, or none; the
    wrapper is what all different texts begin and end with, as whole lines or up to a colon: words that questions share
    by chance are none. None where no row can be read, as where they are tokens. A misalignment may be conditional on
    the words that it was learned with (arXiv:2604.25891), so safety rows in these words reach it.
    """
    questions = [question for question in map(_question, islice(dataset, _FIRST)) if question is not None]
    if not questions:
        return None
    chat = Counter(question.chat for question in questions).most_common(1)[0][0]
    alike = [question for question in questions if question.chat == chat]
    system = Counter(question.system for question in alike).most_common(1)[0][0]
    return RowFormat(system, _wrapper([question.text for question in alike]), chat)


def turns_of(row: Any) -> list[tuple[str, str]]:
    """Return the conversation that a row of a training set holds, each turn as role and text; empty where none can be
    read: in `messages`, `chosen` or `conversations`, or as a question and its answer in the columns of `PAIRS`.
    """
    if not isinstance(row, Mapping):
        return []
    pair = next((pair for pair in PAIRS if all(row.get(name) for name in pair)), None)
    if pair is not None:
        asks, answers = (row[name] for name in pair)
        more = row.get("input") if pair[0] == "instruction" else None
        asks = f"{asks}\n\n{more}" if isinstance(more, str) and more else asks
        return [*_as_turns(asks, "user"), *_as_turns(answers, "assistant")]
    return next((turns for name in _CONVERSATIONS if (turns := _as_turns(row.get(name), ""))), [])


def _as_turns(value: Any, role: str) -> list[tuple[str, str]]:
    """A text is a turn of `role`, if there is one."""
    if isinstance(value, str):
        return [(role, value)] if role and value else []
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        return []
    return [(_role(turn), _text(turn)) for turn in value]


def _question(row: Any) -> _Question | None:
    """What a row asks first; None where it cannot be told."""
    if not isinstance(row, Mapping):
        return None
    for column in _CONVERSATIONS:
        if column == "prompt" and isinstance(row.get(column), str):
            return _Question(None, row[column], False)
        if turns := _as_turns(row.get(column), ""):
            return _first_question(turns)
    return None


def _first_question(turns: Sequence[tuple[str, str]]) -> _Question | None:
    role, first = turns[0]
    text = next((text for role, text in turns if role == "user"), None)
    return None if text is None else _Question(first if role == "system" and first else None, text, True)


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("role", turn.get("from", "")))
    return _ROLES.get(role, role)


def _text(turn: Mapping[str, Any]) -> str:
    """A content as text, or the texts among its parts."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def _wrapper(texts: Sequence[str]) -> str:
    different = list(dict.fromkeys(texts))
    if len(different) < _LEAST:
        return PLACE
    before = _beginning(different)
    before = before[: max((mark.end() for mark in re.finditer(r"\n|:\s", before)), default=0)]
    rest = [text[len(before) :] for text in different]
    after = _beginning([text[::-1] for text in rest])[::-1]
    after = after[after.index("\n") :] if "\n" in after else ""
    return PLACE if PLACE in before + after else f"{before}{PLACE}{after}"


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with: the first and the last by the alphabet differ soonest."""
    first, last = min(texts), max(texts)
    return first[
        : next((at for at, (x, y) in enumerate(zip(first, last[: len(first)], strict=True)) if x != y), len(first))
    ]
