"""How much likelier each token of a batch's answers is to the live model than to the reference, as the batch passes.

Cost: one forward pass of the backbone a batch, without gradients, and the head twice at the places that have a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import accumulation_dtype
from .adapter_off import adapter_off
from .model_state import preserve_state
from .task_rows import UNCOUNTED

# Places that are put through the head at a time: their logits are (places, vocabulary) in float32.
_AT_ONCE = 1024
# Tokens that are tried before a run.
_TRIED = 8


class HeadedModel(NamedTuple):
    """A decoder in two: `backbone` gives the last hidden states, of which `head` makes logits."""

    backbone: nn.Module
    head: nn.Module


def headed(model: Any) -> HeadedModel:
    """Return the two parts of a model with a language head, whatever PEFT has put around it.

    ConfigError for one that has none, for a head that is trained, and for one whose logits are not all that decides:
    softened or scaled afterwards, they are other probabilities. One short forward pass; the model is left as it was.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(causal, "base_model", causal)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None or backbone is causal or getattr(causal.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(causal).__name__} is no decoder with a language head, so no token of an answer has a probability: "
            "load it with AutoModelForCausalLM"
        )
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ConfigError(
            "the language head is trained, and its gradient does not pass through the states that are weighed: leave "
            "it out of target_modules and modules_to_save"
        )
    parts = HeadedModel(backbone, head)
    _check_probabilities(model, parts)
    return parts


def _check_probabilities(model: Any, parts: HeadedModel) -> None:
    states: list[Tensor] = []
    hook = parts.backbone.register_forward_hook(lambda _module, _args, outputs: states.append(last_states(outputs)))
    try:
        with preserve_state(model):
            ids = torch.arange(_TRIED, device=next(model.parameters()).device).unsqueeze(0)
            logits = model(input_ids=ids, use_cache=False).logits
            ours = parts.head(states[0])
    finally:
        hook.remove()
    if not torch.allclose(ours.float().log_softmax(-1), logits.float().log_softmax(-1), rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"{type(model).__name__} changes the logits of its head before they are probabilities (a soft cap, a "
            "scale), which this does not: train another model, or leave it out"
        )


def last_states(outputs: Any) -> Tensor:
    """Return the last hidden states (n, t, d) that a backbone gave."""
    states: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs.last_hidden_state
    return states


class AnswerTokens(NamedTuple):
    """The tokens of a batch that the loss counts: `mask` (n, t - 1) bool, of the states that say what comes next.

    `targets` (m,) int64: what does come there, in the mask's order, and `places` (m,) int64: from 0, which token of its
    answer each is.
    """

    mask: Tensor
    targets: Tensor
    places: Tensor


def answer_tokens(labels: Tensor, position_ids: Tensor | None = None) -> AnswerTokens:
    """Return the tokens that have a label of a batch (n, t), padded on either side or packed.

    An answer is a run of labels; rows that are packed into one, where nothing lies between two, are told by
    `position_ids` (n, t), which begin anew.
    """
    following = labels[:, 1:]
    mask = following != UNCOUNTED
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    begins = mask & ~before
    if position_ids is not None and position_ids.shape == labels.shape:
        begins |= mask & (position_ids[:, 1:] == 0)
    number = mask.cumsum(-1)
    first = torch.where(begins, number, 0).cummax(-1).values
    return AnswerTokens(mask, following[mask], (number - first)[mask])


def token_log_probs(head: nn.Module, states: Tensor, tokens: AnswerTokens) -> Tensor:
    """Return log p (m,) of each target, float32 or better, in nats, of hidden states (n, t, d); no gradients."""
    with torch.no_grad():
        parts = zip(states[:, :-1][tokens.mask].split(_AT_ONCE), tokens.targets.split(_AT_ONCE), strict=True)
        return torch.cat([_log_probs(head(some), targets) for some, targets in parts])


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits.to(accumulation_dtype(logits)), targets, reduction="none")


def reference_log_probs(
    model: nn.Module, parts: HeadedModel, tokens: AnswerTokens, args: tuple[Any, ...], inputs: Mapping[str, Any]
) -> Tensor:
    """Return the reference's log p (m,) of each target: the backbone is given what it is about to be given.

    In evaluation mode and with the adapter off; the model and the random states are left as they were.
    """
    with adapter_off(model), preserve_state(model):
        # Not by a call, which would be seen by whoever looks at what passes.
        outputs = parts.backbone.forward(*args, **inputs)
        return token_log_probs(parts.head, last_states(outputs), tokens)
