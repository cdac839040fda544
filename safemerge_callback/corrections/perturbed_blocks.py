"""The outputs of a model's attention blocks moved along the gradient of its loss, in the pass that is trained on.

For each batch a first pass gives the gradient by the blocks' outputs, and none by parameters: nothing is added to
`.grad`, so no engine hears of it. The pass that follows has the outputs moved, and its gradient is the training's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, shown
from ..live.batch_hooks import batch_hooks
from ..live.faults import Fault, attempt
from ..live.stopwatch import Stopwatch
from ..signals.model_state import preserve_random_states
from ..signals.task_rows import UNCOUNTED

Blocks = Mapping[str, nn.Module]
# Of the blocks' outputs, the same of their gradients, what is to be added to each.
Rule = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def attention_blocks(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """Return path -> module of each attention block: by its class's name, the outermost; or by a pattern of the path.

    ConfigError where there is none, and where gradient checkpointing hides what they give.
    """
    blocks: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        there = "Attention" in type(module).__name__ if pattern is None else re.search(pattern, path) is not None
        if there and not any(path.startswith(f"{outer}.") for outer in blocks):
            blocks[path] = module
    if not blocks:
        raise ConfigError(
            f"no module of the model is an attention block, by {'its class' if pattern is None else shown(pattern)}: "
            "give `blocks`, a pattern of the paths of those whose outputs are to be perturbed"
        )
    for module in model.modules():
        way = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and _reentrant(way):
            raise ConfigError(
                "gradient checkpointing of the reentrant kind hides the blocks' outputs from the loss: train with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or without checkpointing"
            )
    return blocks


def _reentrant(way: Any) -> bool:
    return way is not None and bool(getattr(way, "keywords", {}).get("use_reentrant", True))


@contextmanager
def output_gradients(blocks: Blocks) -> Iterator[Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]]:
    """Yield a function of the loss of a pass made within: the blocks' outputs and its gradient by each, as `blocks`.

    None by a parameter is taken. A block that the loss does not depend on has zeros. That function raises ValueError
    where a block did not pass once.
    """
    outputs: list[tuple[str, Tensor]] = []

    def keep(path: str, _module: nn.Module, _args: Any, output: Any) -> Any:
        states = _states(output)
        if not states.requires_grad:
            states = states.detach().requires_grad_(True)
            output = _with_states(output, states)
        outputs.append((path, states))
        return output

    hooks = [block.register_forward_hook(torch.compiler.disable(partial(keep, path))) for path, block in blocks.items()]

    def gradients(loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        # What is computed again on the way back, under checkpointing, is none of the pass's.
        first = _of_each(blocks, outputs[:])
        taken = torch.autograd.grad(loss, first, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(first, taken, strict=True)]
        return [x.detach() for x in first], filled

    try:
        yield gradients
    finally:
        for hook in hooks:
            hook.remove()


def _of_each(blocks: Blocks, outputs: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """The outputs in the order of the blocks, whichever a model calls first."""
    by_path = dict(outputs)
    if by_path.keys() != blocks.keys() or len(by_path) < len(outputs):
        raise ValueError(
            f"{len(blocks)} attention blocks gave {len(outputs)} outputs in one pass, of {len(by_path)} of them"
        )
    return [by_path[path] for path in blocks]


@contextmanager
def perturbed_batches(
    model: nn.Module, name: str, blocks: Blocks, rule: Rule, watch: Stopwatch, scaler: Any = None
) -> Iterator[PerturbedBatches]:
    """Within, every batch that the model is given with labels in training passes with its blocks' outputs moved.

    `name`: who does so. What goes wrong in the first pass costs that batch its perturbation, and is in what is yielded.
    """
    batches = PerturbedBatches(model, name, blocks, rule, watch, scaler)
    with batch_hooks(model, name) as hooks:
        # First of all: whoever else looks at a batch on its way is to see the pass that is trained on.
        hooks.before(model, batches.begins, first=True)
        hooks.after(model, batches.ends)
        for place, block in enumerate(blocks.values()):
            hooks.after(block, partial(batches.moves, place))
        yield batches
    if not batches.losses and not batches.faults:
        words = "no batch of this step had labels, so there was no loss to perturb against"
        batches.faults.append(Fault(name, words))


@dataclass
class PerturbedBatches:
    """The batches of a step: both passes' mean losses a token, (before, after), on the device, and what went wrong."""

    model: nn.Module
    name: str
    blocks: Blocks
    rule: Rule
    watch: Stopwatch
    scaler: Any = None
    losses: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    before: Tensor | None = None
    moved: list[Tensor] | None = None
    # What makes the mean over its tokens of a batch's loss.
    scale: Tensor | float = 1.0

    def begins(self, _module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Make the first pass of a batch, whose random numbers come again in the second."""
        self.before = self.moved = None
        if not self._trains or inputs.get("labels") is None:
            return
        with self.watch.lap(), preserve_random_states(self.model):
            done = attempt(self.name, lambda: self._first_pass(args, inputs))
        if isinstance(done, Fault):
            self.faults.append(done)
            self.moved = None

    def _first_pass(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        with output_gradients(self.blocks) as gradients:
            # Not by `__call__`: hooks on the whole model see each batch once.
            loss = loss_of(self.model.forward(*args, **inputs))
            outputs, by_outputs = gradients(loss if self.scaler is None else self.scaler.scale(loss))
        self.before, self.moved, self.scale = loss.detach(), self.rule(outputs, by_outputs), _per_token(inputs)

    def moves(self, place: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Move a block's output, in the second pass and where that is computed again on the way back."""
        if self.moved is None or not self._trains:
            return output
        states = _states(output)
        return _with_states(output, states + self.moved[place].to(states.dtype))

    def ends(self, _module: nn.Module, _args: Any, outputs: Any) -> None:
        """Take note of the loss of the second pass."""
        if self.before is not None and self._trains:
            self.losses.append((self.before * self.scale, loss_of(outputs).detach() * self.scale))
            self.before = None

    @property
    def _trains(self) -> bool:
        return self.model.training and torch.is_grad_enabled()


def _per_token(inputs: Mapping[str, Any]) -> Tensor | float:
    """What a batch's loss is multiplied by to be its mean: trainers divide it by the tokens of all a step's batches."""
    items = inputs.get("num_items_in_batch")
    if items is None:
        return 1.0
    scale: Tensor = items / (inputs["labels"][..., 1:] != UNCOUNTED).sum().clamp(min=1)
    return scale


def loss_of(outputs: Any) -> Tensor:
    """Return the loss of a model's outputs; ValueError where there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    loss = outputs[0] if loss is None and isinstance(outputs, tuple) and outputs else loss
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError("the model gives no loss of its own for a batch with labels")
    return loss


def moved_along(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float | None, share: float | None
) -> list[Tensor]:
    """Return what moves the outputs (n, t, d) of L blocks along their gradients; nothing waits for the device.

    With `rho` the norm over all blocks and rows is that. With `share` each row's is that share of `counted_norms`,
    whatever rows are beside it. 0 where a gradient is 0 or not finite.
    """
    lengths = _norms(gradients, per_row=rho is None)
    wanted = lengths.new_tensor(rho) if rho is not None else (share or 0.0) * counted_norms(outputs, gradients)
    factor = torch.where((lengths > 0) & lengths.isfinite(), wanted / lengths, 0.0).view(-1, 1, 1)
    return [torch.where(factor > 0, factor * gradient, 0.0) for gradient in gradients]


def counted_norms(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return of each row the norm (n,) of its outputs at positions that have a gradient: padding has none."""
    counted = [torch.where((g != 0).any(-1, keepdim=True), x, 0.0) for x, g in zip(outputs, gradients, strict=True)]
    return _norms(counted, per_row=True)


def _norms(tensors: Sequence[Tensor], *, per_row: bool) -> Tensor:
    """The norm of all of them together, (1,), or of each row's, (n,); at least in float32."""
    squares = torch.stack([_wide(tensor, tensors[0]).flatten(1).square().sum(1) for tensor in tensors]).sum(0)
    return squares.sqrt() if per_row else squares.sum(0, keepdim=True).sqrt()


def _wide(tensor: Tensor, first: Tensor) -> Tensor:
    return tensor.to(first.device, torch.promote_types(first.dtype, torch.float32))


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_states(output: Any, states: Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states
