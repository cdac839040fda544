"""What a model thinks before it answers, told from the answer: only the answer is judged."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

# What opens and closes a thought: Qwen3 and DeepSeek-R1, then other models' words for it.
_THOUGHT_MARKS = (
    (r"<think>", r"</think>"),
    (r"<thinking>", r"</thinking>"),
    (r"<thought>", r"</thought>"),
    (r"<reasoning>", r"</reasoning>"),
    (r"<seed:think>", r"</seed:think>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    # gpt-oss: whatever stands before the channel `final`
    (r"<\|channel\|>\s*(?:analysis|commentary)[^<]*<\|message\|>", r"<\|channel\|>\s*final[^<]*<\|message\|>"),
)
_MARK = re.compile(
    "|".join(f"(?P<opens{i}>{opens})|(?P<ends{i}>{ends})" for i, (opens, ends) in enumerate(_THOUGHT_MARKS))
)
OPENS, ENDS = "<think>", "</think>"
# Tokens at the end of a prompt among which a mark is looked for.
_LAST = 24
ADVICE = "raise max_new_tokens, or turn thinking off, as by chat_template_kwargs={'enable_thinking': False}"


class Spoken(NamedTuple):
    """A response without its thoughts: `answer` is None where it ends within one; `thought`: whether any was cut."""

    answer: str | None
    thought: bool


class ThoughtCounts(NamedTuple):
    """Of several responses: how many held thoughts, which were cut, and how many of them ended within one."""

    cut: int
    unfinished: int


class _ResponsePiece(NamedTuple):
    text: str
    thought: bool
    ended: bool = True


def spoken(response: str) -> Spoken:
    """Return the answer in a response: the response as it is where no mark of a thought stands in it."""
    pieces = _pieces(response)
    if len(pieces) == 1 and not pieces[0].thought:
        return Spoken(response, False)
    answer = "".join(piece.text for piece in pieces if not piece.thought).strip()
    thought = any(piece.thought and piece.text.strip() for piece in pieces)
    unfinished = not pieces[-1].ended
    return Spoken(None if unfinished and not answer else answer, thought or unfinished)


def answer_of(response: str) -> str:
    """Return the answer in a response; empty where it ends within a thought."""
    return spoken(response).answer or ""


def counts_of(responses: Sequence[str]) -> ThoughtCounts:
    """Count the responses with thoughts, and those that end within one."""
    spoke = [spoken(response) for response in responses]
    return ThoughtCounts(sum(one.thought for one in spoke), sum(one.answer is None for one in spoke))


def tell_unfinished(responses: Sequence[str]) -> None:
    """Warn where a response ends within a thought: it has no answer."""
    if counts_of(responses).unfinished:
        warnings.warn(f"safemerge: responses end within a thought and have no answer: {ADVICE}", stacklevel=3)


def with_marks(tokenizer: Any, prompt: Sequence[int], said: Sequence[int], text: str) -> str:
    """Return the decoded `text` of the token ids `said`, with the marks of its thoughts that decoding left out.

    Those are marks that are special tokens, and one that ends the prompt, where the template itself opens the thought.
    They are put back as `<think>` and `</think>`.
    """
    opening = _open_at_end(tokenizer.decode(list(prompt[-_LAST:]), skip_special_tokens=False))
    special = {token: one.content for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    if not opening and special.keys().isdisjoint(said):
        return text
    pieces = _pieces(opening + tokenizer.decode(list(said), skip_special_tokens=False))
    if not opening and [piece.thought for piece in pieces] == [piece.thought for piece in _pieces(text)]:
        return text
    drop = re.compile("|".join(map(re.escape, special.values())) or r"(?!)")
    bare = [piece._replace(text=drop.sub("", piece.text)) for piece in pieces]
    return "".join(_marked(piece) if piece.thought else piece.text for piece in bare).strip()


def _marked(piece: _ResponsePiece) -> str:
    return f"{OPENS}{piece.text}{ENDS if piece.ended else ''}"


def _open_at_end(prompt: str) -> str:
    """The mark with which a prompt ends, if it opens a thought."""
    last = next(reversed(list(_MARK.finditer(prompt))), None)
    opens = last is not None and str(last.lastgroup).startswith("opens") and not prompt[last.end() :].strip()
    return last.group() if last and opens else ""


def _pieces(response: str) -> list[_ResponsePiece]:
    """Thoughts and what stands around them, in order; what comes before a first end without a beginning is a thought.

    Within a thought only its own end counts.
    """
    pieces: list[_ResponsePiece] = []
    at, opened = 0, ""
    for mark in _MARK.finditer(response):
        name = str(mark.lastgroup)
        if opened and name == opened.replace("opens", "ends"):
            pieces.append(_ResponsePiece(response[at : mark.start()], True))
            at, opened = mark.end(), ""
        elif not opened and name.startswith("opens"):
            pieces.append(_ResponsePiece(response[at : mark.start()], False))
            at, opened = mark.end(), name
        elif not opened and not pieces:
            # the prompt opened it
            pieces.append(_ResponsePiece(response[: mark.start()], True))
            at = mark.end()
    return [*pieces, _ResponsePiece(response[at:], bool(opened), not opened)]
