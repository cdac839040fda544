"""What the aligned model says of each safety row, taken once: log-probabilities, its own loss, the prompt's state.

Cost: one forward pass a row, when a run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.host import to_host
from .model_state import preserve_state
from .responses import alike_lengths, under_bar
from .row_batch import RowBatch, RowOutputs, mean_of_targets, row_batch, row_outputs, target_losses
from .rows import RowTokens


class ReferenceRows(NamedTuple):
    """The reference at a batch's targets (n, t): `log_probs` (n, t, k), float32, of k tokens each.

    `tokens` (n, t, k), int64: which they are, and `rest` (n, t), float32: the log of the probability of all others
    together; both None where k is the vocabulary. `hidden` (n, d), float32: the state at each prompt's last token.
    """

    log_probs: Tensor
    tokens: Tensor | None
    rest: Tensor | None
    hidden: Tensor | None


class ReferenceRow(NamedTuple):
    """The reference on one row, on the CPU, as a row of `ReferenceRows`; `loss`: its own mean loss on the response."""

    log_probs: Tensor
    tokens: Tensor | None
    rest: Tensor | None
    hidden: Tensor | None
    loss: float


class Reference(tuple[ReferenceRow, ...]):
    """What the reference says of each row, in their order."""

    __slots__ = ()

    def rows(self, which: Sequence[int], device: torch.device | str) -> ReferenceRows:
        """Return the reference of these rows, right-aligned as `row_batch` has their targets, on a device."""
        chosen = [self[row] for row in which]

        def aligned(name: str, stack: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
            values = [getattr(row, name) for row in chosen]
            return None if values[0] is None else stack(values).to(device)

        log_probs = _aligned([row.log_probs for row in chosen]).to(device)
        return ReferenceRows(
            log_probs, aligned("tokens", _aligned), aligned("rest", _aligned), aligned("hidden", torch.stack)
        )

    @property
    def rest_mass(self) -> tuple[float, float]:
        """The mean and the largest probability that is in the one bin of all tokens beside the k likeliest.

        The divergence over the bins is never above the whole one, and what it lacks comes from that mass alone.
        """
        rests = [row.rest for row in self if row.rest is not None]
        masses = torch.cat(rests).exp() if rests else torch.zeros(1)
        return float(masses.mean()), float(masses.max())


def take_reference(
    model: nn.Module,
    rows: Sequence[RowTokens],
    *,
    top_k: int | None = 256,
    hidden: bool = False,
    batch_size: int = 8,
    label: str | None = None,
) -> Reference:
    """Return what `model` says of these rows as it is now: put the adapter off before, and it is the aligned model.

    `top_k`: how many of the likeliest tokens are kept at each place, the rest as one bin; None keeps all, 0 none.
    `label` names the progress bar; None for no bar. Every rank must call it where a forward pass takes all of them. The
    model is left as it was.
    """
    device = next(model.parameters()).device
    taken: dict[int, ReferenceRow] = {}
    batches = alike_lengths([len(row.prompt) + len(row.response) for row in rows], batch_size)
    for places in under_bar(batches, label):
        batch = row_batch([rows[i] for i in places], device)
        with preserve_state(model):
            outputs = row_outputs(model, batch, hidden=hidden)
            taken.update(zip(places, _rows_of(outputs, batch, top_k), strict=True))
    return Reference(taken[i] for i in range(len(rows)))


def _rows_of(outputs: RowOutputs, batch: RowBatch, top_k: int | None) -> Iterator[ReferenceRow]:
    losses = mean_of_targets(target_losses(outputs.logits, batch), batch).tolist()
    parts = (*_likeliest(outputs.logits.log_softmax(-1), top_k), outputs.hidden)
    there = iter(to_host([part for part in parts if part is not None]))
    log_probs, tokens, rest, states = (None if part is None else next(there) for part in parts)
    for row, mask in enumerate(batch.mask.cpu()):
        kept, which, others = (None if each is None else each[row][mask] for each in (log_probs, tokens, rest))
        assert kept is not None, "log-probabilities are always kept"
        yield ReferenceRow(kept, which, others, None if states is None else states[row], losses[row])


def _likeliest(log_probs: Tensor, top_k: int | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The k largest, which they are, and the log of what is left; all of them without k."""
    if top_k is None or top_k >= log_probs.shape[-1]:
        return log_probs, None, None
    kept, tokens = log_probs.topk(top_k, dim=-1)
    return kept, tokens, log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1)


def _aligned(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (t_i, ...), of one shape but for t_i, as one (n, t, ...), each at the end, zeros before it."""
    longest = max(map(len, rows))
    aligned = rows[0].new_zeros((len(rows), longest, *rows[0].shape[1:]))
    for place, row in enumerate(rows):
        aligned[place, longest - len(row) :] = row
    return aligned
