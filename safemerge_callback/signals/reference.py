"""What the aligned model says of each safety row, taken once: log-probabilities, its own loss, the prompt's state.

Cost: one forward pass a row, when a run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .model_state import preserve_state
from .row_batch import RowBatch, RowOutputs, row_batch, row_outputs
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
        masses = [float(mass) for row in self if row.rest is not None for mass in row.rest.exp()]
        return (sum(masses) / len(masses), max(masses)) if masses else (0.0, 0.0)


def take_reference(
    model: nn.Module,
    rows: Sequence[RowTokens],
    *,
    top_k: int | None = 256,
    hidden: bool = False,
    batch_size: int = 8,
) -> Reference:
    """Return what `model` says of these rows as it is now: put the adapter off before, and it is the aligned model.

    `top_k`: how many of the likeliest tokens are kept at each place, the rest as one bin; None keeps all. Every rank
    must call it where a forward pass takes all of them. The model is left as it was.
    """
    device = next(model.parameters()).device
    taken: list[ReferenceRow] = []
    for start in range(0, len(rows), batch_size):
        batch = row_batch(rows[start : start + batch_size], device)
        with preserve_state(model):
            taken += _rows_of(row_outputs(model, batch, hidden=hidden), batch, top_k)
    return Reference(taken)


def _rows_of(outputs: RowOutputs, batch: RowBatch, top_k: int | None) -> Iterator[ReferenceRow]:
    every = outputs.logits.log_softmax(-1)
    losses = -every.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    log_probs, tokens, rest = _likeliest(every, top_k)
    for row, mask in enumerate(batch.mask):
        yield ReferenceRow(
            log_probs[row][mask].cpu(),
            None if tokens is None else tokens[row][mask].cpu(),
            None if rest is None else rest[row][mask].cpu(),
            None if outputs.hidden is None else outputs.hidden[row].cpu(),
            float(losses[row][mask].mean()),
        )


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
