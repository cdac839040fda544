"""The lines that a run says in the terminal; pure functions of its settings and counts."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from ...corrections.schedule import interval
from ...decision import BAND, Edit, MergePlan, nothing_selected
from ...methods import get_method
from ...record import JOURNAL_FILE
from ...record.progress import Progress
from ..config.settings import SafeMergeConfig
from .forecast import Forecast, percent

# Mean cosine of two Grams above which they count as one.
ALIKE = 0.95


def opening_line(config: SafeMergeConfig, plan: Forecast, num_modules: int, max_steps: int, step: int = 0) -> str:
    """Return the line that a run begins with: what will be done, how often, and what is left."""
    since = f"going on from step {step:,}, " if step else ""
    if not config.measures:
        return f"{since}{_listed(config)} beside {_count(max_steps, 'step')}, {_count(num_modules, 'module')}"
    where = f"{since}gate {config.gate_at()}, {_count(num_modules, 'module')}"
    if not config.merges:
        return f"{where}: measured {_times(config, max_steps)}, nothing is {'merged' if config.changes else 'changed'}"
    most, least = ("", "") if plan.exact else ("at most ", "at least ")
    merges = f"{most}{_count(plan.merges, 'merge')} planned"
    left = "" if plan.left is None else f", {least}{percent(plan.left)} of the task's early update left after them"
    return f"{where}, {_how(config)}, {_times(config, max_steps)}: {merges}{left}"


def merge_line(step: int, plan: MergePlan, edits: Sequence[Edit], progress: Progress) -> str:
    """Return the line of one merge."""
    lowest = min(plan.readings[edit.name].cosine for edit in edits)
    mean = plan.readings.moved_mean
    figures = (
        f"lowest cosine {lowest:.3f}" if mean is None else f"moved {mean:+z.2f} before it, lowest cosine {lowest:.3f}"
    )
    merged = f"step {step:,}: {len(edits)} of {_count(len(plan.readings), 'module')} merged, {figures}"
    return merged + _left(plan.how.method, progress)


def closing_line(
    config: SafeMergeConfig,
    progress: Progress,
    seconds: float,
    share: float,
    journal: Path,
    last: MergePlan | None = None,
) -> str:
    """Return the line that a run ends with: what was done, the verdict, what it took, and what shows it.

    The verdict is what the `last` check's readings say of lost refusals, which stand before that check's own merge.
    """
    clauses = [_count(progress.checks, "check")] if config.measures else []
    if config.merges:
        clauses.append(
            f"{_count(progress.merges, 'merge')}{_left(config.method, progress)}"
            if progress.merges
            else "NOTHING WAS MERGED"
        )
    names = [one.kind.name for one in config.chosen_corrections]
    clauses += [f"{name} in {_count(progress.correction_steps.get(name, 0), 'step')}" for name in names]
    run = journal.parent if journal.name == JOURNAL_FILE else journal
    moved = last.readings.moved_mean if last else None
    if moved is not None:
        merged = bool(config.safety_adapter) and progress.merges > 0
        clauses.append(f"moved_mean {moved:+z.2f} at the last check, {BAND.words(moved, merged)}")
    took = f"{seconds:.1f} s, {share:.1%} of the training"
    # A run in which nothing was due has no page.
    shows = config.measures or any(progress.correction_steps.values())
    where = f"See it: safemerge report {shlex.quote(str(run))}" if shows else f"Its journal: {journal}"
    return f"done: {', '.join(clauses)} ({took}). {where}"


def nothing_merged(progress: Progress, last: MergePlan | None) -> str:
    """Return what to warn of where a run ends that could have merged and did not; `last` is its last check's plan."""
    if last is None:
        return "nothing was merged: no check fell within the run; set every to fewer steps, or at_train_end"
    if last.selected:
        return (
            f"nothing was merged: the last check selected {len(last.selected)} of {len(last.readings)} modules, and "
            "every merge was taken back; the journal says why"
        )
    return f"in {_count(progress.checks, 'check')} {nothing_selected(last)}"


def lost_at_the_end(changes: Sequence[str], *, reloads: bool) -> str | None:
    """Return what to warn of where the trainer may put other weights in the place of those that changes leave last."""
    if not changes or not reloads:
        return None
    return (
        f"{', '.join(changes)} changes the weights at the last step, and load_best_model_at_end puts those of an "
        "earlier one in their place where they were better, without that change: set it to false, or see which was best"
    )


def broken_modules(step: int, plan: MergePlan) -> str | None:
    """Return what to warn of where updates are not finite; None where all are."""
    broken = [name for name, reading in plan.readings.items() if not reading.finite]
    if not broken:
        return None
    return (
        f"{len(broken)} modules hold NaN or infinite updates at step {step} and are not merged, first "
        f"{broken[0]!r}: lower the learning rate or resume from an earlier checkpoint"
    )


def alike_inputs(step: int, plan: MergePlan) -> str | None:
    """Return what to warn of where the Grams of the task's and of safety inputs agree; None where they do not."""
    cosines = [reading.signals["gram_cosine"] for reading in plan.readings.values() if "gram_cosine" in reading.signals]
    if not cosines or statistics.fmean(cosines) <= ALIKE:
        return None
    mu = plan.how.knobs.get("mu")
    same = "" if mu is None else f", and does what pull does at strength {mu / (1 + mu):.2f}"
    return (
        f"at step {step} modules are given much the same by the task and by safety rows (mean cosine "
        f"{statistics.fmean(cosines):.2f}): method {plan.how.method!r} has nothing to gain by the difference{same}"
    )


def unused_inputs(step: int, plan: MergePlan) -> str | None:
    """Return what to warn of where modules have input features that no kept row of the task used; None without any."""
    unused = {name: int(one.signals.get("unused_features", 0)) for name, one in plan.readings.items()}
    most = max(unused, key=unused.__getitem__, default=None)
    if most is None or not unused[most]:
        return None
    return (
        f"at step {step} the task used none of {unused[most]:,} of {plan.readings[most].shape[1]:,} inputs of "
        f"module {most!r} ({sum(map(bool, unused.values()))} modules have such): of these its Gram says nothing, "
        "and the ridge alone decides"
    )


def _listed(config: SafeMergeConfig) -> str:
    return ", ".join(one.kind.name for one in config.chosen_corrections)


def _left(method: str, progress: Progress) -> str:
    if not get_method(method).takes_away or not progress.task_weights:
        return ""
    return f", {percent(min(progress.task_weights.values()))} of the task's early update left"


def _how(config: SafeMergeConfig) -> str:
    others = " and ".join(config.adapters)
    if config.how.kind.strength is not None:
        target = "the run's average" if "average" in config.how.needs else others or "the aligned model"
        return f"{config.method} {config.strength:g} toward {target}"
    weights = " / ".join(f"{w:g}" for w in config.weights or ())
    return " ".join(filter(None, (config.method, weights, others and f"with {others}")))


def _times(config: SafeMergeConfig, max_steps: int) -> str:
    every = interval(config.every, max_steps)
    bounds = f" from step {config.from_step:,}" if config.from_step else ""
    bounds += "" if config.until_step is None else f" until step {config.until_step:,}"
    often = f"every {every:,} of {max_steps:,} steps{bounds}" if every else ""
    return " and ".join(filter(None, (often, "at the end" if config.at_train_end else "")))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
