"""TRL's SFTTrainer, which on a CPU computes what rows share once, and puts only what is learned through the head.

Apart from `finetune`, which parses settings before anything as heavy as trl is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from trl import SFTTrainer

from safemerge_callback.live.batch_hooks import hooked
from safemerge_callback.signals.model_state import preserve_state
from safemerge_callback.signals.task_rows import whole_batch

# What TRL's fused head says of every place, and its trainer sums.
_SUMMED = ("log_probs", "entropy", "is_top1", "label_mask")


# A shorter beginning is not worth a pass of its own.
_LEAST = 8


class CompletionTrainer(SFTTrainer):
    """An SFTTrainer of the same loss, gradients and metrics, and cheaper where prompts are long and begin alike.

    TRL scores the labelled places alone where Triton is at hand, and every place elsewhere. Here, in one process on a
    CPU, it is handed the labelled places alone (`labelled_places`), and what all rows of a batch begin with, as a
    system prompt and an instruction, is computed once (`beginning_once`). Each only if it comes to what TRL makes of
    the whole (`agrees`); everywhere else this is SFTTrainer.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        alone = self.accelerator.distributed_type == DistributedType.NO and self.args.device.type == "cpu"
        # What needs all logits, and what would be compiled anew for a hook that comes and goes.
        whole = self.compute_loss_func or self.label_smoother or self.args.torch_compile
        self._labels_suffice = alone and not whole and agrees(self.model, labelled_places)
        self._beginnings_suffice = (
            self._labels_suffice and not draws_noise(self.model) and agrees(self.model, _labelled_ends)
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss as SFTTrainer, of a batch with `labels` (batch, length)."""
        if return_outputs or not self._labels_suffice or "shift_labels" in inputs or hooked(self.model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with whole_batch(self.model, inputs):
            ends = beginning_once(model, inputs) if self._beginnings_suffice else inputs
            with labelled_places(self.model, ends) as fewer:
                return super().compute_loss(model, fewer, num_items_in_batch=num_items_in_batch)


def agrees(model: nn.Module, way: Callable[..., AbstractContextManager[dict[str, Any]]], length: int = 24) -> bool:
    """Return whether TRL's fused head says the same of what `way` makes of a batch as of all of it: short passes.

    False, too, where it cannot be asked so: of another version of TRL, and of models whose states and labels differ in
    length. The model is left as it was.
    """
    tokens = torch.arange(length, device=next(model.parameters()).device).repeat(2, 1)
    tokens[1, length // 2 :] = 0
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens.masked_fill((tokens % 2 == 0) | (tokens < length // 2 + 2), -100),
    }
    try:
        with preserve_state(model):
            of_all = _sums(model(**inputs, use_cache=False, fused_lm_head=True))
            with way(model, inputs) as fewer:
                of_fewer = _sums(model(**{**fewer, "use_cache": False}, fused_lm_head=True))
    except Exception:
        # Whatever else raises: SFTTrainer's own way needs nothing of this.
        return False
    return torch.allclose(of_fewer, of_all, rtol=1e-2)


def draws_noise(model: Any) -> bool:
    """Return whether rows that begin alike come out otherwise in training, since something is dropped at random."""
    config = model.config.get_text_config().to_dict()
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or any("drop" in name and bool(value) for name, value in config.items())


def beginning_once(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs of the same loss in which what all rows begin with is computed already, once, with gradients.

    What follows it stays in `input_ids` and `labels`, and its keys and values are repeated in `past_key_values`. The
    inputs as they are where too little is shared, where batches hold more than rows with a mask, or where the model
    keeps anything else than keys and values of all tokens.
    """
    whole = dict(inputs)
    if set(inputs) - {"use_cache"} != {"input_ids", "attention_mask", "labels"} or _recomputes(model):
        return whole
    ids, labels = inputs["input_ids"], inputs["labels"]
    # Up to where a token differs, is padding, or is said by one that has a label: the last that is shared has none.
    differs = (ids != ids[:1]).any(0) | (inputs["attention_mask"] == 0).any(0) | (labels != -100).any(0)
    length = int(differs.nonzero()[0]) - 1 if differs.any() else 0
    if len(ids) < 2 or length < _LEAST:
        return whole
    cache = model(input_ids=ids[:1, :length], use_cache=True, logits_to_keep=1).past_key_values
    if {type(layer).__name__ for layer in getattr(cache, "layers", ())} != {"DynamicLayer"}:
        return whole
    cache.batch_repeat_interleave(len(ids))
    return {**whole, "input_ids": ids[:, length:], "labels": labels[:, length:], "past_key_values": cache}


def _recomputes(model: nn.Module) -> bool:
    """Whether layers are run again in the backward pass, which would fill the cache twice."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def _labelled_ends(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    ends = beginning_once(model, inputs)
    if "past_key_values" not in ends:
        raise ValueError("this model's beginnings cannot be computed apart")
    with labelled_places(model, ends) as fewer:
        yield fewer


def _sums(outputs: Any) -> Tensor:
    return torch.stack([getattr(outputs, name).double().sum() for name in _SUMMED])


@contextmanager
def labelled_places(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield inputs of which, within, TRL's fused head sees the places alone whose next token has a label.

    Of n such, in place of `labels` (batch, length), there are `shift_labels` (1, n), and the backbone gives its last
    hidden states there, (1, n, d).
    """
    labels = inputs["labels"][:, 1:]
    places = labels != -100

    def keep(_module: nn.Module, _args: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][places].unsqueeze(0)
        return outputs

    hook = _backbone(model).register_forward_hook(keep)
    try:
        others = {name: value for name, value in inputs.items() if name != "labels"}
        yield {**others, "shift_labels": labels[places].unsqueeze(0)}
    finally:
        hook.remove()


def _backbone(model: Any) -> nn.Module:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone: nn.Module = causal.base_model
    return backbone
