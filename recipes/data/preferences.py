"""Pairs of answers to one prompt, the better and the worse: rows of one's own, or made of a task's right answers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.row_format import turns_of

from . import load_examples
from .table import RowForm, answered, columns_of, conversation_of
from .tasks import TASKS, Task, get_task

COLUMNS = (
    "prompt, chosen and rejected, each as text or as turns with role and content; or chosen and rejected as whole "
    "conversations that differ in their last answer"
)
_SEED = 0


def pair_of(row: Any, where: str) -> dict[str, Any]:
    """Return a row as `prompt`, `chosen` and `rejected`, each a list of turns.

    ConfigError, with the columns that it has, for a row that holds no two answers to one prompt.
    """
    both = [_conversation(row, name) for name in ("chosen", "rejected")]
    if not all(map(answered, both)):
        raise ConfigError(f"{where} has no prompt with two answers in {columns_of(row)}. Give {COLUMNS}")
    chosen, rejected = (conversation_of(turns, where) for turns in both)
    if chosen["prompt"] != rejected["prompt"]:
        raise ConfigError(f"{where}: chosen and rejected differ before their last answers. Give {COLUMNS}")
    return _pair(chosen["prompt"], chosen["completion"], rejected["completion"])


def _conversation(row: Any, name: str) -> list[tuple[str, str]]:
    """The turns up to an answer, which brings its own prompt, or follows the row's."""
    if not isinstance(row, Mapping):
        return []
    whole = turns_of({"messages": row.get(name)})
    return whole if len(whole) > 1 else turns_of({"prompt": row.get("prompt"), "completion": row.get(name)})


def _pair(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def task_pairs(name: str, split: str = "train") -> list[dict[str, Any]]:
    """Return a task's rows as pairs: chosen is the right answer, rejected a wrong one, another row's.

    Of wrong ones it is one that the question names, where it names some: the other label, another country. Which is
    drawn from a fixed seed. ConfigError for what is no task.
    """
    task, rows = get_task(name), load_examples(name, split)
    answers = sorted({row["completion"][0]["content"] for row in rows})
    rng = random.Random(_SEED)
    return [_with_wrong_answer(task, row, answers, rng) for row in rows]


def _with_wrong_answer(
    task: Task, row: Mapping[str, Any], answers: Sequence[str], rng: random.Random
) -> dict[str, Any]:
    answer, question = row["completion"][0], row["prompt"][-1]["content"]
    wrong = [other for other in answers if not task.right(answer["content"], other)]
    choice = rng.choice([other for other in wrong if other in question] or wrong)
    return _pair(row["prompt"], row["completion"], [{**answer, "content": choice}])


PAIR_FORM = RowForm(TASKS, task_pairs, pair_of, COLUMNS)
