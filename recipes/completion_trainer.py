"""TRL's SFTTrainer, which on a CPU puts only the places that are learned through the model's head.

Apart from `finetune`, which parses settings before anything as heavy as trl is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from trl import SFTTrainer

from safemerge_callback.signals.model_state import preserve_state

# What TRL's fused head says of every place, and its trainer sums.
_SUMMED = ("log_probs", "entropy", "is_top1", "label_mask")


class CompletionTrainer(SFTTrainer):
    """An SFTTrainer of the same loss, gradients and metrics, and cheaper where prompts are not learned.

    TRL scores the labelled places alone where Triton is at hand, and every place elsewhere. Here, in one process on a
    CPU, it is handed the labelled places alone, if they come to what it makes of all (`agrees`). Everywhere else this
    is SFTTrainer.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        alone = self.accelerator.distributed_type == DistributedType.NO and self.args.device.type == "cpu"
        # What needs all logits, and what would be compiled anew for a hook that comes and goes.
        whole = self.compute_loss_func or self.label_smoother or self.args.torch_compile
        self._labels_suffice = alone and not whole and agrees(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss as SFTTrainer, of a batch with `labels` (batch, length)."""
        if return_outputs or not self._labels_suffice or "shift_labels" in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with labelled_places(self.model, inputs) as fewer:
            return super().compute_loss(model, fewer, num_items_in_batch=num_items_in_batch)


def agrees(model: nn.Module, length: int = 8) -> bool:
    """Return whether TRL's fused head says the same of labelled places alone as of all of them: two short passes.

    False, too, where it cannot be asked so: of another version of TRL, and of models whose states and labels differ in
    length. The model is left as it was.
    """
    tokens = torch.arange(length, device=next(model.parameters()).device).unsqueeze(0)
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens.masked_fill(tokens % 2 == 0, -100),
    }
    try:
        with preserve_state(model):
            of_all = _sums(model(**inputs, use_cache=False, fused_lm_head=True))
            with labelled_places(model, inputs) as fewer:
                of_labelled = _sums(model(**fewer, use_cache=False, fused_lm_head=True))
    except Exception:
        # Whatever else raises: SFTTrainer's own way needs nothing of this.
        return False
    return torch.allclose(of_labelled, of_all, rtol=1e-2)


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
