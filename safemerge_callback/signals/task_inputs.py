"""A sample of what each module is given in a run's own batches, kept as they pass: no pass of their own.

Cost: the copies of at most 32 positions a batch and distinct input. They are factors X of a Gram matrix Xᵀ·X, as
`ops.grams` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from ..adapters.host import to_host
from ..live.modules import lora_layers
from .task_rows import Follower

# Positions that one batch of a training may give: so many batches at least are in a sample.
EACH = 32
# Steps over a batch and from one to the next that never come back to a place, so that they spread evenly.
_STEP, _TURN = 0.6180339887498949, 0.3247179572447460


class Places(NamedTuple):
    """Which positions of a batch (b, t) are kept: flat places (k), and for each 1, or 0 where it is padding."""

    places: Tensor
    weights: Tensor
    shape: torch.Size


class InputRows(NamedTuple):
    """Inputs by module (k, d_in) and how many of the rows count; `twins`: module -> the one whose rows it shares."""

    rows: dict[str, Tensor]
    counted: float
    twins: dict[str, str]


class InputState(NamedTuple):
    """What a checkpoint must hold of a sample: its fields, tensors on the CPU."""

    samples: dict[str, list[Tensor]]
    weights: list[Tensor]
    twins: dict[str, str]
    seen: int


@dataclass
class TaskInputs(Follower):
    """The inputs of each module at `rows` positions of this process's last training batches, in the model's dtype.

    Modules that are given one tensor, as q and v of a layer are, share theirs: `twins`. `samples`: module -> (k, d_in)
    of each batch, the latest last; `weights`: (k) of each batch. `seen`: batches so far, by which positions vary.
    """

    rows: int
    samples: dict[str, list[Tensor]] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    twins: dict[str, str] = field(default_factory=dict)
    seen: int = 0
    batch: Places | None = None
    latest: tuple[str, Tensor | None] = ("", None)

    def follow(self, model: nn.Module, adapter_name: str | None = None) -> None:
        """Look at each training batch from now on, as long as this lives; the model is not touched."""
        begin, end, look = _hooks(ref(self))
        model.register_forward_pre_hook(begin, with_kwargs=True)
        model.register_forward_hook(end)
        for name, layer in lora_layers(model, adapter_name)[1].items():
            layer.register_forward_pre_hook(look(name))

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Choose the positions of a batch; no random number is drawn, and the host waits for nothing."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        self.batch, self.latest = None, ("", None)
        for kept in self.samples.values():
            # Of a batch that ended in an error.
            del kept[len(self.weights) :]
        if self.paused or not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        # After a cache of what rows begin with the mask is of that, too.
        ends = mask[:, -ids.shape[1] :] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        there = ends if ends is not None and ends.shape == ids.shape else torch.ones_like(ids)
        flat = there.flatten().to(torch.float32)
        order = (torch.arange(len(flat), device=ids.device) * _STEP + self.seen * _TURN) % 1.0
        # Padding comes last.
        places = (flat + order).topk(min(EACH, self.rows, len(flat))).indices
        self.batch = Places(places, flat[places], ids.shape)

    def look(self, name: str, x: Any) -> None:
        """Keep a module's inputs at the chosen positions."""
        if self.batch is None or not isinstance(x, Tensor) or x.shape[:-1] != self.batch.shape:
            return
        first, tensor = self.latest
        if tensor is x:
            self.twins[name] = first
            return
        self.latest = name, x
        kept = self.samples.setdefault(name, [])
        if len(kept) == len(self.weights):
            kept.append(x.detach().reshape(-1, x.shape[-1])[self.batch.places])

    def end(self) -> None:
        """The batch has gone through: count it, and drop what is too old."""
        if self.batch is None:
            return
        self.weights.append(self.batch.weights)
        self.seen, self.batch, self.latest = self.seen + 1, None, ("", None)
        while sum(map(len, self.weights)) - len(self.weights[0]) >= self.rows:
            del self.weights[0]
            for kept in self.samples.values():
                del kept[:1]

    @property
    def state(self) -> InputState:
        """What a checkpoint must hold."""
        parts = [*(one for kept in self.samples.values() for one in kept), *self.weights]
        here = iter(to_host(parts))
        samples = {name: [next(here) for _ in kept] for name, kept in self.samples.items()}
        return InputState(samples, list(here), dict(self.twins), self.seen)

    def restore(self, state: InputState, device: torch.device) -> None:
        """Go on from what a checkpoint holds."""
        self.samples = {name: [one.to(device) for one in kept] for name, kept in state.samples.items()}
        self.weights = [one.to(device) for one in state.weights]
        self.twins, self.seen = dict(state.twins), state.seen

    def inputs(self) -> InputRows:
        """Return the rows of every module that was in each batch, padding as zeros; waits for the device once."""
        whole = {name: torch.cat(kept) for name, kept in self.samples.items() if len(kept) == len(self.weights) > 0}
        if not whole:
            return InputRows({}, 0.0, dict(self.twins))
        weights = torch.cat(self.weights)
        rows = {name: inputs * weights[:, None].to(inputs.dtype) for name, inputs in whole.items()}
        return InputRows(rows, float(weights.sum()), dict(self.twins))


def joined(parts: Sequence[InputRows]) -> dict[str, Tensor]:
    """Return module -> factor (rows, d_in), float32, of the inputs of all processes; empty where there are none."""
    count = sum(part.counted for part in parts)
    if not count:
        return {}
    whole = {name: torch.cat([part.rows[name].float() for part in parts]) / count**0.5 for name in _common(parts)}
    shared = {name: whole[first] for name, first in parts[0].twins.items() if first in whole}
    return {**whole, **shared}


def _common(parts: Sequence[InputRows]) -> list[str]:
    return [name for name in parts[0].rows if all(name in part.rows for part in parts)]


def _hooks(rows: Callable[[], TaskInputs | None]) -> tuple[Any, Any, Any]:
    """What a model calls before and after a batch, and what makes a module's own."""

    @torch.compiler.disable
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (there := rows()) is not None and module.training and torch.is_grad_enabled():
            there.begin({"input_ids": args[0], **kwargs} if args else kwargs)

    @torch.compiler.disable
    def end(*_: Any) -> None:
        if (there := rows()) is not None:
            there.end()

    def look(name: str) -> Any:
        @torch.compiler.disable
        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and (there := rows()) is not None:
                there.look(name, args[0])

        return before

    return begin, end, look
