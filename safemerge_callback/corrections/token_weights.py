"""Each token of a training batch counts by a weight: its gradient is multiplied where it leaves the language head.

What a token's loss gives the model passes through the hidden state before it, and nothing else does: so the trainer's
own loss stays as it is, with its reduction over micro-batches and ranks, fused with the head or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..live.batch_hooks import batch_hooks
from ..live.faults import Fault, attempt
from ..live.stopwatch import Stopwatch
from ..signals.token_gains import (
    AnswerTokens,
    HeadedModel,
    answer_tokens,
    last_states,
    reference_log_probs,
    token_log_probs,
)

# Of gains (m,) and places (m,) the weights (m,); as `AnswerTokens` has the places.
Weigh = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def weighed_tokens(
    model: nn.Module, parts: HeadedModel, weigh: Weigh, watch: Stopwatch | None = None
) -> Iterator[list[Fault]]:
    """Within, the gradient of each labelled token is multiplied by its weight, in passes of training with gradients.

    `weigh` is given the log-probability that each token has gained over the reference, the model with its adapter off.
    `watch` has the time that this takes. Yields what went wrong: such a batch goes unweighed. ConfigError from the
    forward pass where a batch has no labels.
    """
    faults: list[Fault] = []
    passing = _Passing(model, parts, weigh, faults, watch or Stopwatch(next(model.parameters()).device))
    with batch_hooks(model, "token_weights") as hooks:
        hooks.before(model, passing.labelled)
        hooks.before(parts.backbone, passing.begins)
        hooks.after(parts.backbone, passing.ends)
        yield faults


@dataclass
class _Passing:
    """One batch on its way through the model: its labels, then what the reference says, then the weights."""

    model: nn.Module
    parts: HeadedModel
    weigh: Weigh
    faults: list[Fault]
    watch: Stopwatch
    tokens: AnswerTokens | None = None
    reference: Tensor | None = None

    @property
    def training(self) -> bool:
        return self.model.training and torch.is_grad_enabled()

    def labelled(self, _module: nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if self.training:
            labels = inputs.get("labels")
            if not isinstance(labels, Tensor) or labels.ndim != 2:
                raise ConfigError(
                    "the trainer gives its model no labels (another loss than supervised fine-tuning's, label "
                    "smoothing, compute_loss_func, context parallelism), so it is not known which tokens to weigh: "
                    "train with a Trainer or SFTTrainer without these, or leave the weights out"
                )
            self.tokens = answer_tokens(labels, inputs.get("position_ids"))

    def begins(self, _module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        tokens = self.tokens
        if self.training and tokens is not None and len(tokens.targets):
            with self.watch.lap():
                said = attempt("reference", lambda: reference_log_probs(self.model, self.parts, tokens, args, inputs))
            self.reference = None if isinstance(said, Fault) else said
            self.faults += [said] if isinstance(said, Fault) else []

    def ends(self, _module: nn.Module, _args: tuple[Any, ...], outputs: Any) -> None:
        tokens, reference, self.tokens, self.reference = self.tokens, self.reference, None, None
        if not self.training or tokens is None or reference is None:
            return
        states = last_states(outputs)
        gains = token_log_probs(self.parts.head, states, tokens) - reference
        weights = gains.new_ones(states.shape[:2])
        weights[:, :-1][tokens.mask] = self.weigh(gains, tokens.places)
        states.register_hook(lambda gradient: (gradient * weights.unsqueeze(-1)).to(gradient.dtype))
