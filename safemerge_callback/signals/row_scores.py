"""How likely a model finds each response, and where it places each text; a forward pass a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..live.forward import forward_keywords
from .model_state import preserve_state
from .responses import alike_lengths, under_bar
from .row_batch import mean_of_targets, row_batch, row_outputs, target_losses
from .rows import RowTokens


def response_losses(
    model: Any, rows: Sequence[RowTokens], batch_size: int = 16, label: str | None = None
) -> list[float]:
    """Return the mean −log p of each row's response tokens given what stands before them, in nats a token.

    Its exponential is the perplexity of the response. `label` names the progress bar; None for no bar.
    """
    losses = [0.0] * len(rows)
    batches = alike_lengths([len(row.prompt) + len(row.response) for row in rows], batch_size)
    with preserve_state(model):
        for places in under_bar(batches, label):
            batch = row_batch([rows[i] for i in places], model.device)
            means = mean_of_targets(target_losses(row_outputs(model, batch).logits, batch), batch)
            for i, mean in zip(places, means.tolist(), strict=True):
                losses[i] = mean
    return losses


def mean_states(model: Any, tokens: Sequence[Sequence[int]], batch_size: int = 16, label: str | None = None) -> Tensor:
    """Return the mean over each text's tokens of the last hidden state, (texts, hidden size), float32 on the CPU.

    `label` names the progress bar; None for no bar.
    """
    states: dict[int, Tensor] = {}
    # No logit is asked for, and the head would be put to every token.
    fewest = {"logits_to_keep": 1} if "logits_to_keep" in forward_keywords(model) else {}
    with preserve_state(model):
        for places in under_bar(alike_lengths([len(ids) for ids in tokens], batch_size), label):
            longest = len(tokens[places[0]])
            ids = [[*tokens[i], *[0] * (longest - len(tokens[i]))] for i in places]
            mask = [[1] * len(tokens[i]) + [0] * (longest - len(tokens[i])) for i in places]
            inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            asked = {name: each.to(model.device) for name, each in inputs.items()}
            last = model(**asked, **fewest, output_hidden_states=True)
            for i, state in zip(places, last.hidden_states[-1], strict=True):
                # Padded on the right, where nothing earlier can see it.
                states[i] = state[: len(tokens[i])].float().mean(0).cpu()
    return torch.stack([states[i] for i in range(len(tokens))])
