"""The end of a run: whichever weights the user is left with had their final check, and every copy of them tells so."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from ...adapters import load_adapter, save_adapter
from ...adapters.files import saved_adapter
from ...live.faults import Fault, attempt
from ...live.ranks import from_first
from ...record.entries import best_entry, end_entry
from ...record.metrics import BEST_METRICS
from ..averaging import rewind_average
from ..trackers import finite
from .lines import closing_line, nothing_merged
from .model_card import mark_card, mark_model
from .session import Session, check_failed
from .state import past_of, save_run_again

# Batches of the evaluation set that a reloaded best model is compared on, before and after its merge.
COMPARED_BATCHES = 50


def after_training(
    session: Session,
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module | None,
    batches: Iterable[Any] | None,
) -> None:
    """Check once more if the final check has not happened, or the weights are not those it left; close the records.

    The weights differ where the trainer reloaded the best checkpoint, or something stopped the run after our last hook.
    """
    now = from_first(session.digest()) if session.config.at_train_end else None
    if isinstance(now, Fault):
        check_failed(session.log, state.global_step, now)
    elif now is not None:
        untouched = session.seal == (state.global_step, now)
        if not untouched or session.final_due(state, stopping=True):
            reloaded = not untouched and _reloaded(session, args, state, now)
            _last_check(session, args, state, model, batches, untouched, reloaded)
    if session.witness:
        session.witness.closing()
    session.progress.training_seconds, session.begun = session.training_seconds, None
    progress, seconds = session.progress, session.seconds
    session.log.note(end_entry(state.global_step, progress, seconds, progress.training_seconds))
    session.log.tell(state.global_step, lambda: _say_the_end(session))
    # No adapter where it is sharded: all ranks would have to save it together.
    session.trackers.finish(state.global_step, session.outcome(None if session.writer.sharded else model).write)
    session.trackers.close()
    if session.progress.merges:
        mark_model(model)
    if session.log.first_rank:
        mark_card(Path(args.output_dir), session.section(), begin=True)


def _say_the_end(session: Session) -> None:
    """A run that could have merged and did not is warned of, before the line that ends every run.

    Where a check or a merge failed, that was warned of already.
    """
    if session.config.merges and not session.progress.merges and not session.log.warned & {"measure", "merge"}:
        session.log.warn("nothing merged", nothing_merged(session.progress, session.plan))
    took = (session.seconds, session.share)
    session.log.say(closing_line(session.config, session.progress, *took, session.journal.path, session.plan))


def _reloaded(session: Session, args: TrainingArguments, state: TrainerState, now: str) -> bool:
    """Whether weights that are not those we left are the best checkpoint's.

    Asked for is not done: of an adapter with a name of its own the trainer finds no file, and goes on with the last
    step's weights.
    """
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return False
    return state.best_global_step == state.global_step or session.left != now


def _last_check(
    session: Session,
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module | None,
    batches: Iterable[Any] | None,
    untouched: bool,
    reloaded: bool,
) -> None:
    at = state.global_step if untouched else _provenance(session, state, reloaded)
    compare = reloaded and session.config.merges and model is not None and batches is not None
    before = _loss(model, batches) if compare else None
    edits = session.check(args, state, final=True, at=at)
    if not edits:
        return
    if isinstance(before, float):
        after = _loss(model, batches)
        session.log.tell(state.global_step, lambda: _note_best(session, args, state, before, after))
    if not reloaded:
        _save_again(session, state)
    _log_model_again(session, args, state, model)


def _provenance(session: Session, state: TrainerState, reloaded: bool) -> int:
    """The step that weights which are not those we left are from; where reloaded, their merges are taken over too."""
    sealed_here = session.seal is not None and session.seal[0] == state.global_step
    if not reloaded and not sealed_here:
        return state.global_step
    past = past_of(Path(str(state.best_model_checkpoint))) if reloaded else None
    history = from_first(past.progress if past else None)
    session.progress.rewind(history)
    if past:
        if history is None and session.progress.merges:
            session.log.warn("best", f"the best checkpoint {past.reason}: what was merged into it before is not known")
        rewind_average(session, past)
    return state.best_global_step if reloaded and state.best_global_step is not None else state.global_step


def _loss(model: Any, batches: Any) -> float | Fault:
    return attempt("evaluate", lambda: mean_loss(model, batches))


def mean_loss(model: nn.Module, batches: Iterable[Any], limit: int = COMPARED_BATCHES) -> float:
    """Return the mean loss of `model` on the first `limit` batches of an evaluation loader, in evaluation mode.

    Every rank must call it. Raises whatever a model raises that gives no loss of its own for such batches.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        losses = [model(**batch).loss.detach().float() for batch in islice(batches, limit)]
    finally:
        for module in training:
            module.training = True
    return float(torch.stack(losses).mean())


def _note_best(
    session: Session, args: TrainingArguments, state: TrainerState, before: float, after: float | Fault
) -> None:
    """Tell what the final merge did to the best model, on batches that both were seen on."""
    losses = finite(before), finite(after if isinstance(after, float) else None)
    checkpoint = Path(str(state.best_model_checkpoint)).name
    session.log.note(best_entry(state.global_step, checkpoint, state.best_metric, *losses))
    numbers = dict(zip(BEST_METRICS, losses, strict=True))
    session.trackers.numbers(args, state, {key: value for key, value in numbers.items() if value is not None})


def _save_again(session: Session, state: TrainerState) -> None:
    """Put the merged factors into the checkpoint of this step, which was written before this merge.

    Left alone where an engine keeps its own copy of the weights there, which a resume would read instead.
    """
    factors, checkpoint = session.writer.gather(), session.checkpoint
    if checkpoint is None or checkpoint.step != state.global_step or not checkpoint.folder.is_dir():
        return
    folder = checkpoint.folder
    if (folder / "latest").exists() or any(folder.glob("pytorch_model_fsdp*")):
        return
    try:
        place = saved_adapter(folder, session.writer.adapter_name)
        saved = load_adapter(place, moved_base=True)
        merged = {
            name: replace(old, A=factors[name].A.to(old.A.dtype), B=factors[name].B.to(old.B.dtype))
            for name, old in saved.factors.items()
        }
        save_adapter(place, replace(saved, factors=merged))
        save_run_again(session, checkpoint)
        mark_card(folder, session.section())
    except (OSError, ValueError, KeyError) as error:
        session.log.warn("checkpoint", f"{folder.name} holds the weights before the final merge ({error})")


def _log_model_again(session: Session, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
    """Log the merged adapter to W&B where the trainer, before this merge, has logged the model as an artifact."""
    wanted = os.environ.get("WANDB_LOG_MODEL", "false").lower() in ("end", "checkpoint")
    # A sharded adapter is saved by all ranks together, and this runs on the first alone.
    if model is None or session.writer.sharded or not wanted:
        return
    session.trackers.log_adapter(args, state, model)
