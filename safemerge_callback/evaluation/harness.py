"""The utility side: tasks of lm-eval (EleutherAI's evaluation harness), where it is installed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest, shown
from ..io.paths import as_path
from .intervals import wilson
from .measure import Share, as_share
from .units import SHARE

_ADVICE = "tasks need lm-eval: pip install 'safemerge-callback[eval]', or leave --tasks out"
_Z = 1.959963984540054
# lm-eval's metrics that are a part of 1, by name: others may lie in [0, 1] and be none, as bits a byte, or BLEU of 100.
_SHARES = ("acc", "acc_norm", "exact_match", "em", "mc1", "mc2")


def check_tasks(tasks: Sequence[str], folder: str | Path | None = None) -> Any:
    """Return lm-eval's task manager, which also knows the tasks in `folder`; it reads thousands of files first.

    Raises ConfigError where lm-eval is not installed, or has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        missing = getattr(error, "name", None) or str(error)
        raise ConfigError(f"{_ADVICE} ({missing!r} is missing)") from None
    if folder is not None and not as_path(folder, "task folder").is_dir():
        raise ConfigError(f"task folder {str(folder)!r} is no folder: give one that holds lm-eval's YAML files")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    known = list(manager.all_tasks)
    for task in tasks:
        if not isinstance(task, str) or task not in known:
            raise ConfigError(
                f"task {shown(task)} is unknown to lm-eval: `lm-eval ls tasks` lists {len(known)}{nearest(task, known)}"
            )
    return manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    manager: Any = None,
    seed: int = 0,
) -> list[Share]:
    """Return the figures of tasks, as `lm_eval.simple_evaluate` gives them; `limit`: so many rows of each at most;
    `manager`: from `check_tasks`.

    Questions stand in the model's chat template where it has one, which is given `chat_template_kwargs`. The 95 %
    interval is Wilson's where the value is a count of the n, else the value and 1.96 of lm-eval's standard errors.
    Raises ConfigError as `check_tasks`, where lm-eval would drop those settings, and where a task cannot be run (its
    data out of reach, say).
    """
    manager = check_tasks(tasks) if manager is None else manager
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **_for_template(HFLM, chat_template_kwargs)
    )
    try:
        report = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            apply_chat_template=bool(tokenizer.chat_template),
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:
        # Thousands of tasks, each with its own code and data, raise whatever they like.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"tasks {list(tasks)} cannot be run ({type(error).__name__}: {reason}). If it is their data, go online once"
        ) from error
    return [figure for task in tasks for figure in task_figures(task, report)]


def _for_template(wrapper: Any, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """What tells lm-eval's wrapper of the chat template's settings; older ones drop what they do not know, silently."""
    if not settings:
        return {}
    if "chat_template_args" not in inspect.signature(wrapper.__init__).parameters:
        raise ConfigError(
            f"this lm-eval gives nothing to chat templates, so chat_template_kwargs {dict(settings)} would not reach "
            "the tasks: pip install -U lm-eval, or leave it or --tasks out"
        )
    return {"chat_template_args": dict(settings)}


def task_figures(task: str, report: Mapping[str, Any]) -> list[Share]:
    """Return the figures of one task or group out of what `simple_evaluate` returned."""
    n = sum(report["n-samples"][leaf]["effective"] for leaf in _leaves(task, report))
    row = report["results"].get(task) or report.get("groups", {}).get(task, {})
    figures = []
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        unit = SHARE if (metric in _SHARES or metric.endswith("_acc")) and 0 <= value <= 1 else ""
        low, high = _interval(float(value), n, row.get(f"{metric}_stderr,{kind}"), unit)
        name = f"{task}_{metric}" if kind == "none" else f"{task}_{metric}_{kind}"
        figures.append(as_share(name, "task", float(value), n, low, high, unit=unit, judge="lm-eval"))
    return figures


def _leaves(task: str, report: Mapping[str, Any]) -> Iterator[str]:
    """The tasks under a group, or the task itself."""
    below = report.get("group_subtasks", {}).get(task) or []
    if not below:
        yield task
    for name in below:
        yield from _leaves(name, report)


def _interval(value: float, n: int, error: Any, unit: str) -> tuple[float | None, float | None]:
    count = round(value * n)
    if unit == SHARE and n and abs(value * n - count) < 1e-6:
        return wilson(count, n)
    if not isinstance(error, int | float):
        return None, None
    low, high = value - _Z * error, value + _Z * error
    return (max(0.0, low), min(1.0, high)) if unit == SHARE else (low, high)
