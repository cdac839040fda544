"""Rows of each kind that trainers ask for, of a vocabulary of numbered words."""

from __future__ import annotations

import random
from typing import Any

ROWS = 12


def words(seed: int, count: int = 6) -> str:
    """A sentence of numbered words."""
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(50)}" for _ in range(count))


def rows(**columns: Any) -> Any:
    """A data set whose columns are functions of the row's number."""
    from datasets import Dataset

    return Dataset.from_list([{name: make(i) for name, make in columns.items()} for i in range(ROWS)])


def turn(role: str, text: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": role, "content": text}]


def text() -> Any:
    """Plain text."""
    return rows(text=lambda i: words(i, 10))


def chat() -> Any:
    """Conversations of a question and an answer."""
    return rows(messages=lambda i: turn("user", words(i)) + turn("assistant", words(100 + i)))


def preferences() -> Any:
    """A prompt, a chosen and a rejected answer."""
    return rows(prompt=words, chosen=lambda i: " " + words(100 + i), rejected=lambda i: " " + words(200 + i))


def triples() -> Any:
    """Preferences with a third, the reference answer."""
    return rows(
        prompt=words,
        chosen=lambda i: " " + words(100 + i),
        rejected=lambda i: " " + words(200 + i),
        reference=lambda i: " " + words(300 + i),
    )


def judged() -> Any:
    """A prompt, one answer, and whether it was good."""
    return rows(prompt=words, completion=lambda i: " " + words(100 + i), label=lambda i: i % 2 == 0)


def prompts() -> Any:
    """Prompts alone."""
    return rows(prompt=words)


def questions() -> Any:
    """Prompts as conversations."""
    return rows(prompt=lambda i: turn("user", words(i)))


def advised() -> Any:
    """Prompts as conversations, with a text that only the teacher sees."""
    return rows(prompt=lambda i: turn("user", words(i)), privileged_context=lambda i: words(100 + i))


def tokens(length: int = 10) -> Any:
    """Token ids with themselves as labels."""
    mask = [1] * length

    def ids(i: int) -> list[int]:
        rng = random.Random(i)
        return [rng.randrange(9, 60) for _ in range(length)]

    return rows(input_ids=ids, attention_mask=lambda _: mask, labels=ids)


def classes(per_token: bool = False) -> Any:
    """Token ids with one of two classes, for the whole or for each token."""
    plain = tokens().remove_columns("labels")
    labels = [[j % 2 for j in range(10)] if per_token else i % 2 for i in range(ROWS)]
    return plain.add_column("labels", labels)


def pays(completions: list[Any], **_: Any) -> list[float]:
    """A reward of 0 or 1 that differs between completions, whatever they say."""
    return [float(sum(map(ord, str(c))) % 2) for c in completions]
