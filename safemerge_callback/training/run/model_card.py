"""The model cards that the trainer writes say what was done: a section between our comments, and a tag."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ...io.card import TAG, edit_card, front_matter, is_card
from ...live.faults import Fault, attempt
from .artifact import CARD_FILE, TITLE, Section, base_model_of


def mark_card(folder: Path, section: Section | None, *, begin: bool = False, model: Any = None) -> None:
    """Put what the run did into the card in `folder`, with the tag where it changed the model.

    A card that cannot be is told of. Where there is no card, `begin` makes one, with the base of `model`: whoever saves
    the adapter there later goes on with it. A README without a card's head is somebody's own, such as that of a project
    which trains into its own folder, and stays as it is.
    """
    if section is None:
        return
    path, tag = folder / CARD_FILE, TAG if section.changed else None

    def mark() -> None:
        if begin and folder.is_dir() and not path.exists():
            path.write_text(f"{front_matter(base_model_of(model), tag=tag)}{TITLE}", encoding="utf-8")
        if path.is_file() and is_card(path):
            edit_card(path, section.text, tag)

    outcome = attempt("card", mark)
    if isinstance(outcome, Fault):
        warnings.warn(f"safemerge: the card {str(path)!r} was left as it is ({outcome.error})", stacklevel=3)


def mark_model(model: Any) -> None:
    """Let the cards that PEFT and the trainer write of `model` from now on have the tag."""
    if hasattr(model, "add_model_tags"):
        attempt("card", lambda: model.add_model_tags([TAG]))


def mark_push(args: TrainingArguments, mark: Callable[[Path], None]) -> None:
    """Call `mark` with the output folder before it is uploaded: now, and once more where its card is written anew.

    `Trainer.push_to_hub` writes the card after its only hook, by `create_model_card`, and uploads it at once.
    """
    folder = Path(args.output_dir)
    mark(folder)
    trainer = _pushing()
    if trainer is None:
        return
    write, before = trainer.create_model_card, dict(vars(trainer))

    def create_model_card(*positional: Any, **keywords: Any) -> None:
        del trainer.create_model_card
        vars(trainer).update({name: before[name] for name in ("create_model_card",) if name in before})
        write(*positional, **keywords)
        mark(folder)

    trainer.create_model_card = create_model_card


def _pushing() -> Any:
    """The trainer whose `push_to_hub` calls this; None for anything else. No hook is handed the trainer."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "push_to_hub" and hasattr(frame.f_locals.get("self"), "create_model_card"):
            return frame.f_locals["self"]
    return None
