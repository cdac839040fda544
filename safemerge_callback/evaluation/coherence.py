"""Is a response language at all? A proxy: it is neither empty nor the same thing over and over."""

from __future__ import annotations

import re

# Greedy decoding does not leave a loop it has entered, so the end of a response tells.
LAST_WORDS, LAST_CHARACTERS = 40, 160
FEW_WORDS, FEW_CHARACTERS = 8, 24
# Share of distinct ones below which words, or runs of four characters, repeat.
WORDS_REPEAT, CHARACTERS_REPEAT = 0.3, 0.2
_WORD = re.compile(r"\w+")


def coherent(response: str) -> bool:
    """Whether `response` has words and does not repeat itself.

    It repeats itself where fewer than 3 in 10 of its last 40 words are distinct (8 words at least), or fewer than 1 in
    5 of the runs of four characters in its last 160 (24 characters at least; for scripts without spaces, and for one
    endless word). A proxy, and no more: it finds the collapse of a model, and neither nonsense in fresh words nor a
    fluent answer beside the question.
    """
    words = _WORD.findall(response.lower())
    if not words:
        return False
    last = words[-LAST_WORDS:]
    if len(last) >= FEW_WORDS and len(set(last)) < WORDS_REPEAT * len(last):
        return False
    text = " ".join(response.lower().split())[-LAST_CHARACTERS:]
    runs = [text[i : i + 4] for i in range(len(text) - 3)]
    return len(text) < FEW_CHARACTERS or len(set(runs)) >= CHARACTERS_REPEAT * len(runs)
