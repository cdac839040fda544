"""Everything that can be wrong is found before the first step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import TrainerState, TrainingArguments

from ...adapters import Adapter, LoraFactors, load_adapter
from ...adapters.snapshot import set_aside_snapshot
from ...corrections.average import Average, RunAverage
from ...corrections.check_rows import RowSettings
from ...corrections.gradient import order_line, way_for
from ...corrections.merge import Merge
from ...corrections.protocol import (
    Batchwise,
    Correction,
    GradientTerm,
    Kept,
    PassSeries,
    Prepared,
    RunPoint,
    RunStart,
    Term,
)
from ...corrections.schedule import Schedule
from ...decision import (
    check_safety_adapter,
    cosines_needed,
    needs_of,
)
from ...decision.unmerged import base_tensors, unmerged, warning_of
from ...errors import ConfigError, JournalError
from ...io.addresses import source_name
from ...io.paths import as_path
from ...live import Writer, base_moved, base_weights, writer_for
from ...live.engine import engine_of
from ...live.micro_batch import MicroBatch
from ...live.optimizer import check_optimizer
from ...live.ranks import all_or_none, from_first
from ...ops import LowRank
from ...record import JOURNAL_FILE, Journal, read_journal
from ...record.entries import Sources, start_entry, versions_of
from ...record.log import Log
from ...record.progress import Progress, changed_settings, continue_journal, rebuilt
from ...subspace import Subspace
from ..config.settings import SafeMergeConfig, public_settings
from ..trackers import Trackers
from .check_data import RunData, open_data
from .clock import Clock
from .decide import check_schedule_of_run, choices_of
from .forecast import forecast, too_strong
from .lines import lost_at_the_end, opening_line
from .rehearsal import Measuring, rehearse
from .session import Session
from .shares import place, rank_share
from .state import Past, kept_of, resumed

# The callback and the run that hold a model, while both live.
_HOLDERS: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = WeakKeyDictionary()
# Whose versions the journal tells.
_VERSIONED = ("torch", "transformers", "peft", "safemerge-callback")


def alone(callback: object, model: nn.Module | None, state: TrainerState) -> None:
    """Raise ConfigError where this run is served already, by another callback of this kind or by this very one.

    Each would undo the other's counts.
    """
    if model is None:
        return
    other = guard_of(model, state)
    if other is callback:
        raise ConfigError(
            "this trainer has its SafeMergeCallback twice: give it once, in callbacks= or to add_callback"
        )
    if other is not None:
        raise ConfigError("this trainer has two SafeMergeCallbacks: keep one, and give it the settings of both")
    _HOLDERS[model] = (ref(callback), ref(state))


def dismissed(model: nn.Module | None) -> None:
    """Forget who serves this model: its run has ended."""
    if model is not None:
        _HOLDERS.pop(model, None)


def guard_of(model: nn.Module | None, state: TrainerState) -> Any:
    """Return the SafeMergeCallback that serves this run, or None."""
    holder, run = _HOLDERS.get(model, (lambda: None, lambda: None)) if model is not None else (None, lambda: None)
    return holder() if holder is not None and run() is state else None


def open_session(
    config: SafeMergeConfig,
    model: nn.Module | None,
    args: TrainingArguments,
    state: TrainerState,
    optimizer: Any = None,
    tokenizer: Any = None,
    trainer: Any = None,
) -> Session:
    """Load subspace and safety adapter, check them against the live model, ready the journal, restore a resumed run.

    `trainer`: where it was attached. Raises a `SafeMergeError` child that says what does not fit and what to do;
    nothing has been trained yet.
    """
    if model is None:
        raise ConfigError("the trainer gave no model to the callback: pass the callback to a Trainer that has a model")
    began = time.perf_counter()
    if config.changes:
        check_optimizer(optimizer, config.optimizer_state)
    idle = check_schedule_of_run(config, state.max_steps)
    _check_journal(config, args, state)
    past = resumed(args, state)
    initial = _initial(config, model, past, state)
    writer = writer_for(model, adapter_name=config.adapter_name, optimizer=optimizer, initial=initial)
    factors = writer.gather()
    if config.changes and config.optimizer_state != "keep":
        writer.parameters(factors)
    safety = _safety_adapters(config, factors)
    left = _unmerged(model, safety, factors)
    measuring = _measuring(config, model, writer, factors, safety) if config.measures else Measuring()
    at = RunPoint(state.global_step, state.max_steps, writer, measuring.subspace, safety, optimizer)
    merge = _merge(config)
    corrections, batch = _corrections(config, model, at, trainer)
    bars = state.is_world_process_zero and not (config.quiet or args.disable_tqdm)
    lines, seconds = _prepare(corrections, model, tokenizer, bars=bars)
    data = _data(config, model, at, tokenizer, corrections, lines, bars=bars)
    for kept in kept_of(merge, corrections, data):
        _take_up(kept, past)
    rehearse(config, at, merge, measuring, data)
    progress, journal, restored = _records(config, at.subspace, past, args, state)
    plan = forecast(config, list(factors), state.max_steps, state.global_step, progress.task_weights)
    of_a_run = {"placement": measuring.placement, "world_size": args.world_size, "prepared": seconds or None}
    if config.measures:
        of_a_run["planned"] = plan.to_dict()
    start = _start(state.global_step, config, at.subspace, len(factors), restored=restored, left_out=left, **of_a_run)
    progress.journal_entries += journal.append(start)
    log, trackers = _outlets(config, state, journal, progress)
    clock = Clock(progress, begun=began)
    with_what = (measuring.share, measuring.reference, left, corrections, batch, data)
    session = Session(config, args, state, at, merge, log, trackers, clock, *with_what)
    if words := warning_of(left):
        log.warn("left out", words)
    session.marks.seal(state.global_step)
    trackers.open(args, state, config.to_publish())
    beside = [f"beside that: {', '.join(one.name for one in corrections)}"] if corrections and config.measures else []
    for line in (opening_line(config, plan, len(factors), state.max_steps, state.global_step), *beside, *lines):
        log.say(line)
    lost = _lost(corrections, args)
    for kind, words in (("strength", too_strong(config, plan, state.max_steps)), ("schedule", idle), ("lost", lost)):
        if words:
            log.warn(kind, words)
    progress.seconds += time.perf_counter() - began
    session.begin_again()
    return session


def _measuring(
    config: SafeMergeConfig,
    model: nn.Module,
    writer: Writer,
    factors: Mapping[str, LoraFactors],
    safety: Sequence[Adapter],
) -> Measuring:
    """The subspace, the safety adapters' cosines, where V is kept, and this process's share of the modules."""
    subspace = _subspace(config, model, writer, factors)
    reference = cosines_needed([config.gate_at()], safety, factors, subspace)
    choice = place(config, subspace, factors)
    return Measuring(subspace, reference, choice.to_dict(), rank_share(choice, factors, subspace))


def _subspace(
    config: SafeMergeConfig, model: nn.Module, writer: Writer, factors: Mapping[str, LoraFactors]
) -> Subspace:
    """The subspace, which fits the factors and the base weights."""
    # A base weight that gave a part of itself to the factors is not the aligned checkpoint's any more.
    weights = {} if writer.initial else base_weights(model)
    subspace = _opened(str(config.subspace))
    subspace.check(factors, weights)
    if config.gate_at().asks_cosines or "subspace" in _needs(config):
        # A compressed file may leave a decision open at any check: its exact one is looked for now.
        subspace.exact()
    return subspace


def _opened(source: str) -> Subspace:
    """The subspace of a file or of the Hub, where all processes take the commit that the first one finds."""
    subspace = all_or_none(lambda: Subspace.from_pretrained(source))
    pinned = from_first(subspace.address)
    if pinned is None or pinned == subspace.address:
        return subspace
    return all_or_none(lambda: Subspace.from_pretrained(pinned))


def _needs(config: SafeMergeConfig) -> dict[str, str]:
    """What the settings need to be there, and who says so: the merge, or else another correction."""
    of_the_merge = needs_of(config.how, config.gate_at(), config.rules) if config.measures else {}
    return {**_listed(config), **of_the_merge}


def _listed(config: SafeMergeConfig) -> dict[str, str]:
    """What the corrections of the list need, and which of them."""
    return {need: f"correction {one.kind.name!r}" for one in config.chosen_corrections for need in one.kind.needs}


def _outlets(
    config: SafeMergeConfig, state: TrainerState, journal: Journal, progress: Progress
) -> tuple[Log, Trackers]:
    """Where the run speaks: each of the two tells the other what it cannot say itself."""
    log = Log(config.quiet, state.is_world_process_zero, journal, progress)
    trackers = Trackers(log)
    log.alert = trackers.alert
    return log, trackers


def _start(
    step: int, config: SafeMergeConfig, subspace: Subspace | None, num_modules: int, **of_a_run: Any
) -> dict[str, Any]:
    """The journal's entry of this training, with what `start_entry` takes of a training besides."""
    sources = Sources(None, None, None)
    if subspace is not None:
        sources = Sources(subspace.name, subspace.aligned, subspace.unaligned)
    return start_entry(step, _published(config, subspace), versions_of(*_VERSIONED), sources, num_modules, **of_a_run)


def _published(config: SafeMergeConfig, subspace: Subspace | None) -> dict[str, Any]:
    """The settings as they leave this machine; a subspace of the Hub at its commit, so that a resume sees another."""
    pinned = {} if subspace is None or subspace.address is None else {"subspace": subspace.address}
    return {**config.to_publish(), **pinned}


def _initial(
    config: SafeMergeConfig, model: nn.Module, past: Past, state: TrainerState
) -> Mapping[str, LowRank] | Literal["now"] | None:
    """What factors that began as a part of the base weight began with: the present ones, or the checkpoint's."""
    if state.global_step == 0 or not base_moved(model, config.adapter_name):
        return "now"
    return from_first(all_or_none(lambda: past.initial() if state.is_world_process_zero else {}))


def _safety_adapters(config: SafeMergeConfig, factors: Mapping[str, LoraFactors]) -> tuple[Adapter, ...]:
    """The safety adapters where they will be merged; kept outside the model, which would save and train them."""
    merged = config.merges and "safety_adapter" in config.how.kind.optional.union(_needs(config))
    if not merged and "safety_adapter" not in _listed(config):
        return ()
    adapters = tuple(load_adapter(name) for name in config.adapters)
    for safety in adapters:
        check_safety_adapter(safety, factors, space=config.space)
    return adapters


def _unmerged(model: nn.Module, safety: Sequence[Adapter], modules: Collection[str]) -> dict[str, str]:
    """What a merge leaves out of each safety adapter of which it leaves out anything."""
    base = base_tensors(model)
    return {source_name(adapter.source): words for adapter in safety if (words := unmerged(adapter, modules, base))}


def _corrections(
    config: SafeMergeConfig, model: nn.Module, at: RunPoint, trainer: Any
) -> tuple[list[Correction | Term | Batchwise], MicroBatch | None]:
    """The corrections of the list, made anew, and how a gradient term's pass is made, if there is one.

    ConfigError for one that cannot be in this training.
    """
    engine = engine_of(model, at.optimizer)
    corrections = [chosen.for_run(engine, at.max_steps) for chosen in config.chosen_corrections]
    terms = [one for one in corrections if isinstance(one, GradientTerm | PassSeries)]
    return corrections, way_for(terms, model, at.optimizer, trainer)


def _prepare(
    corrections: Sequence[Correction | Term | Batchwise], model: nn.Module, tokenizer: Any, *, bars: bool
) -> tuple[list[str], dict[str, float]]:
    """Let the corrections ready themselves; return what they have to say, and the seconds of each by name."""
    order = order_line([one for one in corrections if isinstance(one, GradientTerm | PassSeries)])
    lines: list[str] = [] if order is None else [order]
    seconds: dict[str, float] = {}
    for one in corrections:
        if isinstance(one, Prepared):
            began = time.perf_counter()
            one.prepare(RunStart(model, tokenizer, lines.append, bars))
            seconds[one.name] = time.perf_counter() - began
    return lines, seconds


def _lost(corrections: Sequence[object], args: TrainingArguments) -> str | None:
    """What to warn of where the trainer may reload weights without what is changed at the end."""
    last = [one.name for one in corrections if isinstance(one, Correction) and one.schedule.at_train_end]
    return lost_at_the_end(last, reloads=args.load_best_model_at_end)


def _data(
    config: SafeMergeConfig,
    model: nn.Module,
    at: RunPoint,
    tokenizer: Any,
    corrections: Sequence[object],
    lines: list[str],
    *,
    bars: bool,
) -> RunData:
    """The rows that checks ask the live model about; a line on them is added to `lines`."""
    needs: dict[str, str] = {}
    about: dict[str, Any] = {"knobs": {}, "adapter_name": config.adapter_name}
    # Without checks nothing is chosen: neither gate nor method has a meaning.
    if config.measures:
        choices, needs = choices_of(config), _needs(config)
        about["knobs"] = {**choices.how.taken, **choices.gate.reads, **choices.rules}
    rows = RowSettings.of(config.data)
    data, line = open_data(needs, rows, at, model, tokenizer, corrections, bars=bars, **about)
    if line is not None:
        lines.append(line)
    return data


def _merge(config: SafeMergeConfig) -> Merge:
    """The merge, with the average of the run's updates where its method goes to that."""
    names = ("every", "from_step", "until_step", "at_train_end")
    schedule = Schedule(**{name: getattr(config, name) for name in names})
    if not config.merges or "average" not in _needs(config):
        return Merge(schedule)
    return Merge(schedule, RunAverage(Average(float(config.ema_decay or 0.0)), int(config.ema_every or 1)))


def _take_up(kept: Kept, past: Past) -> None:
    """Go on from what the checkpoint that the run goes on from holds of it."""
    stored = kept.load(past.folders, past.save)
    # Without any state there is one warning for all of it.
    if not stored and past.progress is not None:
        warnings.warn(f"safemerge: the checkpoint holds no {kept.noun}, so it starts anew", stacklevel=5)


def _records(
    config: SafeMergeConfig, subspace: Subspace | None, past: Past, args: TrainingArguments, state: TrainerState
) -> tuple[Progress, Journal, bool]:
    """The progress of the resumed checkpoint and the journal cut back to it, or new ones; whether it was found."""
    progress, first = past.progress, state.is_world_process_zero
    path, settings = _journal_path(config, args), _published(config, subspace)
    if progress:
        # These stand in a record only where there are any.
        none = {"corrections": None, "data": None, "knobs": None}
        _tell_changes(none | public_settings(progress.config), none | settings)
    count = progress.journal_entries if progress else None
    # A refusal on the first rank alone would leave the others waiting for it.
    entries = all_or_none(lambda: _continued(path, state.global_step, count) if first else [])
    if first and state.global_step == 0:
        set_aside_snapshot(Path(args.output_dir))
    if progress is None and state.global_step > 0:
        progress = from_first(rebuilt(entries))
        _tell_loss(past.reason, state.global_step, progress)
    restored, progress = progress is not None, progress or Progress()
    progress.config, progress.journal_entries = settings, len(entries)
    return progress, Journal(path, enabled=first), restored


def _journal_path(config: SafeMergeConfig, args: TrainingArguments) -> Path:
    return as_path(config.journal or Path(args.output_dir) / JOURNAL_FILE, "journal", error=JournalError)


def _check_journal(config: SafeMergeConfig, args: TrainingArguments, state: TrainerState) -> None:
    """Raise JournalError for a path that can be no journal, before anything is loaded or measured; nothing is changed.

    What is wrong with the lines of a journal is told when it is gone on with.
    """
    path, first = _journal_path(config, args), state.is_world_process_zero
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        all_or_none(lambda: read_journal(path) if first and path.exists() else [])


def _tell_loss(reason: str, step: int, progress: Progress | None) -> None:
    """Warn that a resume goes on from a checkpoint without our state, and what holds instead."""
    instead = f"counts are the journal's ({progress.merges} merges until then)" if progress else "all counts begin anew"
    warnings.warn(f"safemerge: the checkpoint of step {step} {reason}: {instead}", stacklevel=5)


def _continued(path: Path, step: int, count: int | None) -> list[Mapping[str, Any]]:
    try:
        return continue_journal(path, step, count)
    except JournalError:
        raise
    except OSError as error:
        raise JournalError(
            f"journal {str(path)!r} cannot be written ({error}): set journal to a writable path"
        ) from error


def _tell_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Warn once of every setting that is not what the checkpoint was trained with; the new ones hold."""
    changes = changed_settings(old, new)
    if changes:
        warnings.warn(f"safemerge: settings changed since the checkpoint, the new ones hold: {changes}", stacklevel=4)
