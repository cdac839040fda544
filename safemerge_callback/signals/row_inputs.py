"""What each module is given where a model reads rows; cost: one forward pass over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..live.modules import lora_layers
from .model_state import preserve_state
from .responses import alike_lengths
from .row_batch import RowBatch, row_batch, row_outputs
from .rows import RowTokens


@dataclass
class RowInputs:
    """Inputs at chosen places, (k, d_in) of each batch; `twins`: modules that are given one tensor.

    `places`: those of the batch that goes through, flat (k), chosen once for all modules. `tokens`: its (n, length).
    """

    places: Tensor
    tokens: torch.Size
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    latest: tuple[str, Tensor | None] = ("", None)

    def look(self, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep a module's inputs."""
        x = args[0]
        if x.shape[:-1] != self.tokens:
            raise AdapterError(
                f"module {name!r} is given {tuple(x.shape)} for {tuple(self.tokens)} tokens, so it has no Gram of its "
                "inputs: adapt other modules, or choose a method that needs none"
            )
        if self.latest[1] is x:
            self.twins[name] = self.latest[0]
            return
        self.latest = name, x
        self.parts.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1])[self.places])


def row_inputs(
    model: nn.Module,
    rows: Sequence[RowTokens],
    adapter_name: str | None = None,
    *,
    whole: bool = False,
    batch_size: int = 8,
) -> dict[str, Tensor]:
    """Return module -> factor (n, d_in), float32, of its inputs from each prompt's end on, n tokens in all.

    These are the positions that predict the responses; `whole`: all positions. A factor is inputs over √n, as
    `ops.grams` has it. The model is left as it was; every rank must call it where a pass takes all of them.
    AdapterError for a module that is not given each token, and for one that no row reaches.
    """
    layers = lora_layers(model, adapter_name)[1]
    device = next(model.parameters()).device
    inputs = RowInputs(torch.empty(0), torch.Size())
    for places in alike_lengths([len(row.prompt) + len(row.response) for row in rows], batch_size):
        batch = row_batch([rows[i] for i in places], device)
        inputs.places, inputs.tokens, inputs.latest = _places(batch, whole=whole), batch.input_ids.shape, ("", None)
        with preserve_state(model), _watched(layers, inputs):
            row_outputs(model, batch)
    joint = {name: torch.cat(parts).float() for name, parts in inputs.parts.items()}
    firsts = {name: inputs.twins.get(name, name) for name in layers}
    if lost := [name for name, first in firsts.items() if first not in joint]:
        raise AdapterError(f"module {lost[0]!r} is given no input where the model reads rows: adapt other modules")
    factors = {name: rows / len(rows) ** 0.5 for name, rows in joint.items()}
    return {name: factors[first] for name, first in firsts.items()}


def _places(batch: RowBatch, *, whole: bool) -> Tensor:
    """Flat places of the tokens that predict a response's, or of all that are no padding; waits for the device."""
    length, targets = batch.input_ids.shape[1], batch.mask.shape[1]
    kept = batch.attention_mask.bool() if whole else torch.nn.functional.pad(batch.mask, (length - targets, 0))
    return kept.flatten().nonzero().squeeze(-1)


@contextmanager
def _watched(layers: Mapping[str, nn.Module], inputs: RowInputs) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(partial(inputs.look, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
