"""Which safety rows to mix in: those that an alignment has taught most, or that suit a task and differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError, shown
from ..io.texts import check_whole
from ..signals.chat import inherited, rendered, template_settings, text_part
from ..signals.row_format import turns_of
from ..signals.rows import Kind, SafetyRow
from .rows import columns_of

# Rows on which two tokenizers are compared.
_COMPARED = 64
# How much relevance counts against diversity, as SPARD has it.
POWER = 4.0


class Chosen(NamedTuple):
    """A row that was chosen, where it stood among those given, its score, and why in words."""

    row: SafetyRow
    place: int
    score: float
    reason: str


def select_by_gap(
    rows: Sequence[SafetyRow], aligned: Sequence[float], unaligned: Sequence[float], count: int
) -> list[Chosen]:
    """Return the rows of each kind with the largest gap between two models' losses, in order of the gap.

    gap_i = L_unaligned(y_i | x_i) − L_aligned(y_i | x_i), each the mean loss of the response's tokens
    (`response_losses`): the logarithm of the ratio of the perplexities. A large gap is what the alignment has taught
    and a drifting model would forget. The kinds keep their parts of `count`, so that no one-sided set comes out.

    Source: Kaczér et al., arXiv:2508.06249 (interleaved data chosen by the perplexity gap between aligned and
    misaligned model). Differs: a ratio where the paper speaks of a gap, since a difference of perplexities is ruled by
    the few responses that one model finds absurd; and the kinds are chosen apart. The unaligned model may be any one
    that has lost or never had the alignment: the base, or the user's own task fine-tuned without a guard.
    """
    gaps = [there - here for here, there in zip(aligned, unaligned, strict=True)]
    chosen: list[Chosen] = []
    for kind, part in parts(rows, count).items():
        order = sorted((i for i, row in enumerate(rows) if row.kind == kind), key=lambda i: (-gaps[i], i))
        for rank, i in enumerate(order[:part], 1):
            reason = (
                f"{rank} of {len(order)} {kind} rows by perplexity gap: {gaps[i]:+.3f} nats a token "
                f"({unaligned[i]:.3f} unaligned, {aligned[i]:.3f} aligned)"
            )
            chosen.append(Chosen(rows[i], i, gaps[i], reason))
    return sorted(chosen, key=lambda one: (-one.score, one.place))


def select_by_dpp(rows: Sequence[SafetyRow], states: Any, task: Any, count: int, power: float = POWER) -> list[Chosen]:
    """Return the rows of each kind that suit a task and differ from one another, in the order chosen.

    `states` (rows, d) and `task` (rows of the task, d) are `mean_states` of one model. The relevance of a row is its
    largest cosine to a task's row, q_i = max_t cos(e_i, e_t), 0 where it is negative, and the rows are the greedy mode
    of a k-DPP with the kernel K_ij = (q_i·q_j)^power·cos(e_i, e_j): `greedy_dpp`. Fewer than asked come out where the
    rest adds nothing new; ConfigError where no row is relevant at all. The kinds keep their parts of `count`.

    Source: SPARD, arXiv:2605.28030 (power 4; 3 % of the task's rows). Differs: the kinds are chosen apart, so that
    harmless rows stay; and nothing is cached, where the released code keeps a choice by the data set's name, whatever
    the model and the user's rows are.
    """
    import torch

    from ..ops.dpp import greedy_dpp

    cosines = (
        torch.nn.functional.normalize(states.double(), dim=1) @ torch.nn.functional.normalize(task.double(), dim=1).T
    )
    relevance = cosines.amax(1).clamp(min=0.0)
    chosen: list[Chosen] = []
    for kind, part in parts(rows, count).items():
        places = [i for i, row in enumerate(rows) if row.kind == kind]
        for rank, (at, new) in enumerate(greedy_dpp(states[places], relevance[places] ** power, part), 1):
            i = places[at]
            q = float(relevance[i])
            reason = f"{rank} of {len(places)} {kind} rows by dpp: relevance {q:.3f} to the task, {new:.0%} of it new"
            chosen.append(Chosen(rows[i], i, q ** (2 * power) * new, reason))
    if not chosen:
        raise ConfigError("no row has anything in common with the task (no cosine is above 0): choose by gap")
    return chosen


def parts(rows: Sequence[SafetyRow], count: int) -> dict[Kind, int]:
    """Return how many of `count` rows each kind gives: as its part of the rows, and at least one of each."""
    if count < 1:
        raise ConfigError(f"{count} rows are asked for: give 1 or more")
    kinds = Counter(row.kind for row in rows)
    count = min(count, kinds.total())
    if len(kinds) == 1 or count == 1:
        kind: Kind = max(kinds, key=lambda one: kinds[one])
        return {kind: count}
    harm = min(max(1, round(count * kinds["harm"] / kinds.total())), count - 1)
    return {"harm": harm, "benign": count - harm}


def chosen_text(chosen: Sequence[Chosen]) -> str:
    """Return the rows as JSON lines that `load_rows` reads, each with its `reason`."""
    lines = [{**columns_of(one.row), "reason": one.reason} for one in chosen]
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)


def task_tokens(
    model: Any, tokenizer: Any, rows: Sequence[Any], settings: Mapping[str, Any] | str | None = None
) -> list[list[int]]:
    """Return the rows of a training set as token ids, the longest cut to what the model takes.

    A conversation (`turns_of`) in the chat template, else a text in `text`. ConfigError for a row that has neither.
    """
    kwargs, text = template_settings(settings), text_part(tokenizer)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = []
    for place, row in enumerate(rows, 1):
        turns = turns_of(row)
        plain = row.get("text") if isinstance(row, Mapping) else None
        if not turns and not (isinstance(plain, str) and plain):
            raise ConfigError(
                f"row {place} of the training rows is {shown(row)}: give rows with messages, with prompt and "
                "completion, or with text"
            )
        written = rendered(text, turns, **inherited(tokenizer), **kwargs) if turns else plain
        check_whole(str(written), f"row {place} of the training rows")
        tokens.append(text(written, add_special_tokens=False)["input_ids"][:limit])
    if not tokens:
        raise ConfigError("the training rows are empty: give the rows of the task")
    return tokens


def check_same_tokens(tokenizer: Any, other: Any, rows: Sequence[SafetyRow]) -> None:
    """Raise ConfigError where two tokenizers write the rows otherwise: the two models are then no pair."""
    for row in rows[:_COMPARED]:
        one, two = (text_part(each)(row.response, add_special_tokens=False)["input_ids"] for each in (tokenizer, other))
        if one != two:
            raise ConfigError(
                "the tokenizers of the aligned and the unaligned model write the same response in different tokens: "
                "give two checkpoints of one model, whose difference is the alignment"
            )
