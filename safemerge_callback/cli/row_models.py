"""How `safemerge select` has models read rows: one in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..evaluation.loading import Subject
    from ..signals.rows import RowTokens, SafetyRow


class Opening(NamedTuple):
    """How models are opened and read."""

    dtype: str
    device: str | None
    batch_size: int
    chat_template_kwargs: dict[str, Any]


def losses_of(
    rows: Sequence[SafetyRow], aligned: str, unaligned: str, opening: Opening
) -> tuple[list[float], list[float]]:
    """Return the losses of the two models, one of them in memory at a time."""
    from ..evaluation.loading import accelerator, is_adapter, load_pretrained, load_subject
    from ..evaluation.selection import check_same_tokens
    from ..signals.row_scores import response_losses

    how: dict[str, Any] = {"dtype": opening.dtype, "device": opening.device}
    subject = load_subject(aligned, **how)
    tokens, tokenizer = tokens_of(subject, rows, opening), subject.tokenizer
    here = response_losses(subject.model, tokens, opening.batch_size, label="aligned")
    del subject
    gc.collect()
    # The tokens are those of the aligned model's template: its counterpart need not have one.
    if is_adapter(unaligned):
        model, other = load_subject(unaligned, **how)[:2]
    else:
        model, other = load_pretrained(unaligned, who="unaligned model", dtype=opening.dtype)
        model = model.to(accelerator(opening.device))
    check_same_tokens(tokenizer, other, rows)
    return here, response_losses(model, tokens, opening.batch_size, label="unaligned")


def states_of(rows: Sequence[SafetyRow], task: Sequence[Any], aligned: str, opening: Opening) -> tuple[Any, Any]:
    """Return where the aligned model places the rows, and the task's."""
    from ..evaluation.loading import load_subject
    from ..evaluation.selection import task_tokens
    from ..signals.row_scores import mean_states

    subject = load_subject(aligned, dtype=opening.dtype, device=opening.device)
    tokens = [[*row.prompt, *row.response] for row in tokens_of(subject, rows, opening)]
    others = task_tokens(subject.model, subject.tokenizer, task, opening.chat_template_kwargs)
    here = mean_states(subject.model, tokens, opening.batch_size, label="safety rows")
    return here, mean_states(subject.model, others, opening.batch_size, label="training rows")


def tokens_of(subject: Subject, rows: Sequence[SafetyRow], opening: Opening) -> tuple[RowTokens, ...]:
    """Return the rows as the model's tokens; ConfigError for one that it cannot take."""
    from ..evaluation.harvest import check_lengths
    from ..signals.responses import check_vocabulary
    from ..signals.rows import row_tokens

    tokens = row_tokens(subject.tokenizer, rows, settings=opening.chat_template_kwargs)
    whole = [[*row.prompt, *row.response] for row in tokens]
    check_vocabulary(subject.model, whole)
    check_lengths(subject.model, whole, 0)
    return tokens
