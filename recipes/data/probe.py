"""A safety probe of a run on the validation split, so that its journal shows refusals and task score over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safemerge_callback.evaluation import share
from safemerge_callback.signals import generate
from safemerge_callback.training import SafetyEvalCallback

from .splits import prompts_of, rows_of
from .tasks import TASKS, get_task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from safemerge_callback.evaluation import Share

BATCH = 32


def validation_probe(
    data: str, *, every: int, n: int, chat_template_kwargs: Mapping[str, Any] | None = None
) -> SafetyEvalCallback:
    """Return a probe of `n` prompts of HarmBench and `n` harmless ones, and of 2·`n` rows where `data` is a task.

    All are of the validation split: the test split stays unread. What the model says is not kept.
    """
    harmful = {"harmbench": prompts_of("harmbench", "validation", n)}
    benign = {"benign": prompts_of("benign", "validation", n)}
    task = task_score(data, 2 * n, chat_template_kwargs) if data in TASKS else None
    more: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "batch_size": BATCH, "quiet": True}
    return SafetyEvalCallback(harmful, benign, every=every, n=n, task=task, **more)


def task_score(name: str, n: int, chat_template_kwargs: Mapping[str, Any] | None = None) -> Callable[[Any, Any], Share]:
    """Return a function of model and tokenizer that gives the share of right answers to `n` validation rows."""
    task = get_task(name)
    rows = rows_of(task, "validation", n)
    prompts = [row["prompt"][-1]["content"] for row in rows]
    wanted = [row["completion"][0]["content"] for row in rows]

    def score(model: Any, tokenizer: Any) -> Share:
        options: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "batch_size": BATCH}
        said = generate(model, tokenizer, prompts, label=name, chat_template_kwargs=chat_template_kwargs, **options)
        return share(f"{name}_right", [task.right(word, answer) for word, answer in zip(wanted, said, strict=True)])

    return score
