"""The tasks of the grid: their rows that are not trained on, and when an answer is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safemerge_callback.errors import ConfigError, nearest
from safemerge_callback.evaluation import says
from safemerge_callback.signals import answer_of

from . import load_examples
from .near_duplicates import without_near


@dataclass(frozen=True)
class Task:
    """A task: which splits of its data are evaluated on, how many tokens an answer takes, and when it is right.

    `by_words`: whether rows whose prompts share most content words are near-duplicates; where all prompts are of one
    template, as sums are, only equal ones are.
    """

    name: str
    splits: tuple[str, ...]
    max_new_tokens: int
    right: Callable[[str, str], bool]
    by_words: bool


def says_number(wanted: str, response: str) -> bool:
    """Whether the first number in the answer of `response`, with its sign, is `wanted`."""
    number = re.search(r"-?\d+", answer_of(response).replace("\N{MINUS SIGN}", "-").replace(",", ""))
    return number is not None and int(number.group()) == int(wanted)


def says_name(wanted: str, response: str) -> bool:
    """Whether the answer of `response` begins with the words of `wanted`, whatever the case and what is no letter."""
    words, answer = (re.findall(r"[^\W\d_]+", text.lower()) for text in (wanted, answer_of(response)))
    return bool(words) and answer[: len(words)] == words


TASKS = {
    task.name: task
    for task in (
        Task("sentiment", ("test", "spare"), 3, says, True),
        Task("arithmetic", ("test",), 6, says_number, False),
        Task("cities", ("test",), 10, says_name, False),
    )
}


# The same for rows of one's own, by name.
CHECKS: dict[str, Callable[[str, str], bool]] = {"word": says, "number": says_number, "name": says_name}


def get_task(name: str) -> Task:
    """Return a task by name; ConfigError for one that the grid cannot evaluate."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown: choose among {sorted(TASKS)}{nearest(name, TASKS)}")
    return TASKS[name]


def task_rows(task: Task) -> list[dict[str, Any]]:
    """Return every row that may be evaluated on: none twice, and none that is trained on or near one that is."""
    rows = {text_of(row): row for split in task.splits for row in load_examples(task.name, split)}
    trained = [text_of(row) for row in load_examples(task.name)]
    kept = without_near(rows, trained) if task.by_words else [text for text in rows if text not in set(trained)]
    return [rows[text] for text in kept]


def text_of(row: dict[str, Any]) -> str:
    """Return what a row's question is about: its last paragraph, without the template before it."""
    return row["prompt"][-1]["content"].rpartition("\n\n")[2]
