"""The last rows of a run's own batches, kept as they pass: no pass of their own, and no wait for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .rows import RowTokens

# What a loss does not count, as transformers marks it.
UNCOUNTED = -100
# Tokens of a row that are kept, and of its response: a row is there to be asked about, not to be trained on.
LONGEST, LONGEST_RESPONSE = 512, 256
# What goes to a model beside token ids and belongs to them: such rows cannot be asked by their ids alone.
_OTHER_INPUTS = ("pixel_values", "input_features", "input_values", "inputs_embeds")

# Who follows which model.
_FOLLOWERS: WeakKeyDictionary[nn.Module, list[ref[TaskRows]]] = WeakKeyDictionary()


class Passed(NamedTuple):
    """A batch as the model was given it, on its device: (n, t) each, or None where it was given none."""

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None


@dataclass(kw_only=True)
class Follower:
    """Who looks at the batches of a training as they pass."""

    paused: bool = False

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within, batches are not the task's."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


@dataclass
class TaskRows(Follower):
    """The last `count` rows that this process trained on; what it began with goes before what it has seen since."""

    count: int
    earlier: Sequence[RowTokens] = ()
    batches: deque[Passed] = field(default_factory=deque)

    def follow(self, model: nn.Module) -> None:
        """Look at each training batch of a model from now on, as long as this lives; the model is not touched."""
        rows = ref(self)

        @torch.compiler.disable
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (there := rows()) is not None and module.training and torch.is_grad_enabled():
                there.see({"input_ids": args[0], **kwargs} if args else kwargs)

        model.register_forward_pre_hook(look, with_kwargs=True)
        _FOLLOWERS.setdefault(model, []).append(rows)

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Keep what a batch holds of token ids; of older batches as many as still count.

        What is only a part of its rows, after a cache of what they begin with, is none.
        """
        ids = inputs.get("input_ids")
        foreign = any(inputs.get(name) is not None for name in (*_OTHER_INPUTS, "past_key_values"))
        if self.paused or foreign or not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        others = (inputs.get(name) for name in Passed._fields[1:])
        same = [x.detach().clone() if isinstance(x, Tensor) and x.shape == ids.shape else None for x in others]
        self.batches.append(Passed(ids.detach().clone(), *same))
        while sum(len(one.input_ids) for one in self.batches) - len(self.batches[0].input_ids) >= self.count:
            self.batches.popleft()

    def rows(self) -> tuple[RowTokens, ...]:
        """Return them, the latest last, as prompts and responses; waits for the device once a batch that is kept."""
        seen = [row for one in self.batches for row in rows_of(one)]
        return tuple([*self.earlier, *seen][-self.count :])


@contextmanager
def whole_batch(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let whoever keeps the rows of a model see this batch; within, what the model is given itself is none.

    For a trainer that gives its model other inputs than the batch that it trains on.
    """
    followers = [rows for one in _FOLLOWERS.get(model, ()) if (rows := one()) is not None]
    with ExitStack() as stack:
        for rows in followers:
            if model.training and torch.is_grad_enabled():
                rows.see(inputs)
            stack.enter_context(rows.unseen())
        yield


def rows_of(batch: Passed) -> list[RowTokens]:
    """Return a batch's rows: up to the first token that the loss counts the prompt, from there the response.

    What stands between two answers of a conversation counts as a part of the response. Without labels all but the first
    token does. Padding is left out; rows that are packed into one are told by their positions, which begin anew. Rows
    of which no token counts are left out. Long ones are cut to 512 tokens, around the place where the response begins.
    """
    here = [None if part is None else part.cpu() for part in batch]
    rows = []
    for i, ids in enumerate(here[0] if here[0] is not None else ()):
        mask, labels, positions = (None if part is None else part[i] for part in here[1:])
        labels = ids if labels is None else labels
        if mask is not None:
            ids, labels = ids[mask.bool()], labels[mask.bool()]
        packed = mask is None and positions is not None
        starts = [int(at) for at in (positions == 0).nonzero()] if packed else [0]  # type: ignore[union-attr]
        ends = [*starts[1:], len(ids)]
        rows += [_row(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    return [row for row in rows if row is not None]


def _row(ids: Sequence[int], labels: Sequence[int]) -> RowTokens | None:
    counted = [at for at, label in enumerate(labels) if label != UNCOUNTED and at > 0]
    if not counted:
        return None
    response = tuple(ids[counted[0] : counted[-1] + 1][:LONGEST_RESPONSE])
    return RowTokens(tuple(ids[: counted[0]][-(LONGEST - len(response)) :]), response, "task")
