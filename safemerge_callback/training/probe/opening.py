"""What a probe is given, made ready and checked before the first step; apart, so that the hooks fit on one screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from ...errors import ConfigError, JournalError, shown
from ...evaluation.judges import Judge, check_benign, measure_name
from ...io.numbers import is_whole
from ...io.paths import as_path
from ...live.ranks import all_or_none
from ...record import JOURNAL_FILE, Journal
from ...record.progress import continue_journal
from ...signals.rows import Kind
from ..run.guarded import GuardedRun
from .probing import Probing, Rules

Prompts = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def prompt_sets(prompts: Prompts, kind: Kind, n: int, seed: int) -> dict[str, list[str]]:
    """Return name -> prompts: sets as `load_prompts` takes them, `n` of each, or a mapping's own lists, whole.

    ConfigError for anything else, for a set of the other kind, and as `load_prompts`.
    """
    if isinstance(prompts, Mapping):
        named = {str(name): one for name, one in prompts.items() if isinstance(one, str)}
        loaded = dict(zip(named, _loaded(list(named.values()), kind, n, seed), strict=True))
        return {
            name: loaded[name][1] if name in loaded else _texts(name, one)
            for name, one in zip(map(str, prompts), prompts.values(), strict=True)
        }
    if not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts are {shown(prompts)}: give names of sets, or a mapping of name to prompts")
    names = [prompts] if isinstance(prompts, str) else list(prompts)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ConfigError(f"prompt set {shown(wrong[0])} is no name: give names, or a mapping of name to prompts")
    sets = _loaded(names, kind, n, seed)
    twice = sorted({name for name, _ in sets if [one for one, _ in sets].count(name) > 1})
    if twice:
        raise ConfigError(f"prompt set {twice[0]!r} is given twice: give each once, or a mapping with names of its own")
    return dict(sets)


def _loaded(names: Sequence[str], kind: Kind, n: int, seed: int) -> list[tuple[str, list[str]]]:
    from ...evaluation.prompts import check_prompt_set, load_prompt_sets

    for name in names:
        if (other := check_prompt_set(name)) != kind:
            place = "prompts" if other == "harm" else "benign"
            raise ConfigError(f"prompt set {name!r} is of kind {other!r}: give it as {place}=")
    return [(texts.name, list(texts.prompts)) for texts in load_prompt_sets(names, n, seed)]


def _texts(name: str, prompts: Sequence[str]) -> list[str]:
    if not isinstance(prompts, Iterable):
        raise ConfigError(f"prompt set {name!r} is {shown(prompts)}: give a list of texts")
    texts = list(prompts)
    wrong = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if wrong:
        raise ConfigError(f"prompt set {name!r} holds {shown(wrong[0])}: give texts that are not empty")
    return texts


def choose_tokenizer(tokenizer: Any, processing_class: Any) -> Any:
    """Return what to ask with, the callback's `tokenizer` or processor, or the trainer's; ConfigError for neither."""
    choice = tokenizer if tokenizer is not None else processing_class
    if choice is None:
        raise ConfigError(
            "the trainer has no tokenizer to ask prompts with: give the trainer processing_class=..., or "
            "SafetyEvalCallback tokenizer=..."
        )
    return choice


def check_sizes(*, every: int, n: int, seed: int, max_new_tokens: int, batch_size: int) -> None:
    """Raise ConfigError for a number that is too small."""
    least = {
        "every": (every, 0),
        "n": (n, 1),
        "seed": (seed, 0),
        "max_new_tokens": (max_new_tokens, 1),
        "batch_size": (batch_size, 1),
    }
    for name, (value, lowest) in least.items():
        if not is_whole(value, lowest):
            raise ConfigError(f"{name} is {shown(value)}: give an integer of at least {lowest}")


def check_rules(rules: Rules, *, every: int, task: bool, eval_batches: bool, measures: Iterable[str]) -> None:
    """Raise ConfigError for a rule that could never do anything; `measures` are those of harm."""
    rollback, known = rules.rollback, list(measures)
    if rollback and rollback.task is not None and not task:
        raise ConfigError("rollback looks at the task's score: give task, a function of model and tokenizer")
    if rollback and rollback.eval_loss is not None and not eval_batches:
        raise ConfigError(
            "rollback looks at the evaluation loss: give eval_batches, such as trainer.get_eval_dataloader (and add "
            "the callback with trainer.add_callback)"
        )
    for name, rule in (("trigger", rules.trigger), ("stop", rules.stop)):
        if rule and every == 0:
            raise ConfigError(f"{name} needs periodic probes: set every to a number of optimizer steps")
        if rule and rule.measure is not None and rule.measure not in known:
            raise ConfigError(f"{name} measure {rule.measure!r} is not measured: choose among {known}")


def check_rules_of_run(rules: Rules, *, every: int, max_steps: int) -> None:
    """Raise ConfigError for a rule that could never act in a run of so many steps: no periodic probe falls into it."""
    for name, rule in (("trigger", rules.trigger), ("stop", rules.stop)):
        if rule and every > max_steps:
            raise ConfigError(
                f"{name} needs periodic probes, and every={every} gives none in a run of {max_steps} steps: set every "
                f"to {max_steps} or less, or leave {name} out"
            )


def check_judges(judge: Judge, benign_judge: Judge, benign: Iterable[str]) -> None:
    """Raise ConfigError where over-refusal would be judged by a judge of harm."""
    for name in benign:
        check_benign(benign_judge, name)
        measure_name(name, judge)


def connect(probing: Probing, guard: GuardedRun | None, journal: str | None) -> None:
    """Let `probing` look at the merges of `guard` and write where it writes; without one, open a journal of its own.

    Raises ConfigError where a rule needs a guard that merges, and where the guard is watched already.
    """
    for name, deed in (("rollback", "take back"), ("trigger", "ask for")):
        able = guard and (guard.changes if name == "rollback" else guard.merges)
        if getattr(probing.rules, name) and not able:
            raise ConfigError(f"rule {name} is set and the trainer has {_lacking(guard, deed)}, or leave the rule out")
    if guard is None:
        # A refusal on the first rank alone would leave the others waiting for it.
        probing.log.journal = all_or_none(lambda: _opened(journal, probing.args, probing.state))
        return
    guard.watch(probing)
    if journal is not None:
        raise ConfigError(f"journal is {journal!r}: the journal is the SafeMergeCallback's, set it there")
    probing.guard, probing.trackers, probing.log.beneath = guard, guard.trackers, guard.log


def _lacking(guard: GuardedRun | None, deed: str) -> str:
    """What there is in the place of a guard that merges, and what to do."""
    if guard is None:
        return "no SafeMergeCallback: add one that merges"
    if guard.measures:
        return "a SafeMergeCallback that never merges: add one that merges"
    words = f"a SafeMergeCallback without a subspace, which makes no merge that it could {deed}"
    return f"{words}: give it the safety-subspace file (`safemerge build` makes one)"


def _opened(journal: str | None, args: TrainingArguments, state: TrainerState) -> Journal:
    path = as_path(journal or Path(args.output_dir) / JOURNAL_FILE, "journal", error=JournalError)
    try:
        if state.is_world_process_zero:
            continue_journal(path, state.global_step, None)
        return Journal(path, enabled=state.is_world_process_zero)
    except JournalError:
        raise
    except OSError as error:
        raise JournalError(f"journal {str(path)!r} cannot be written ({error}): set journal to another") from error
