"""The writer of a live model; each parameter is read and written as what it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ...adapters.factors import LoraFactors
from ...errors import AdapterError, nearest
from ...ops import LowRank
from ..initial import initial_factors, since
from ..modules import LoraModule, active_adapter, base_moved, lora_modules
from ..ranks import all_or_none
from .commit import FactorSlots, commit, read_all
from .kinds import EngineKinds, unwrapped


class Writer(Protocol):
    """Reads and replaces the LoRA factors of one adapter of a live model; `sharded` where reading takes all ranks."""

    @property
    def initial(self) -> Mapping[str, LowRank]:
        """The factors that updates are measured against, where they began as a part of the base weight; else empty."""

    @property
    def adapter_name(self) -> str:
        """The name of the adapter in the model."""

    @property
    def sharded(self) -> bool:
        """Whether reading takes all ranks."""

    def gather(self) -> dict[str, LoraFactors]:
        """Return canonical name -> full factors, detached. Collective where the model is sharded."""

    def write(self, new: Mapping[str, LowRank]) -> None:
        """Replace the factors of the modules named, all or none: A (r, d_in) and B (d_out, r) in the live units."""

    def parameters(self, names: Iterable[str]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return name -> the live (A, B) Parameters, as the model registers them."""


class LiveWriter:
    """Edits the live Parameters in place, so that optimizer, engine and the autograd graph keep the same objects.

    Make one with `writer_for`. With many processes every rank must call the same methods in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str | None = None,
        optimizer: Any = None,
        initial: Mapping[str, LowRank] | Literal["now"] | None = None,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        # Fixed now: a trainer may switch the active adapter for a moment, to compute reference log-probabilities.
        self.adapter_name = active_adapter(model, adapter_name)
        self._moved_base = initial is not None and base_moved(model, self.adapter_name)
        self.sharded = EngineKinds.of(model, optimizer).sharded
        self.initial: Mapping[str, LowRank] = {}
        _, pairs = self._look()
        for module, pair in pairs.values():
            _check_shapes(module, pair)
        if self._moved_base:
            self.initial = initial_factors(self.gather()) if isinstance(initial, str) else dict(initial or {})
            since(self.gather(), self.initial)

    def gather(self) -> dict[str, LoraFactors]:
        """Return canonical name -> whole factors, detached: fp32 masters where there are, else in the live dtype.

        Collective where an engine shards or keeps masters in fragments; the live tensors themselves, not copied, where
        they are whole. Beside the factors, one FSDP1 unit or one parameter at a time is held.
        """
        # All ranks look before any gathers, so that one whose model is refused leaves no other waiting.
        _, pairs = all_or_none(self._look) if self.sharded else self._look()
        tensors = read_all([slot for _, pair in pairs.values() for slot in pair])
        wholes = zip(pairs.values(), tensors[::2], tensors[1::2], strict=True)
        factors = {module.name: module.factors(A, B) for (module, _), A, B in wholes}
        return since(factors, self.initial) if self.initial else factors

    def write(self, new: Mapping[str, LowRank]) -> None:
        """Replace the factors of the modules in `new`, all or none: A (r, d_in), B (d_out, r), in the live units.

        Collective with many processes: rank 0's values are cast once and written on every rank, into master and
        low-precision copy. Raises as `commit` does, on every rank.
        """
        _, pairs = all_or_none(self._look)
        commit({name: pair for name, (_, pair) in pairs.items()}, new)

    def parameters(self, names: Iterable[str]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return name -> the (A, B) Parameters as the model registers them: whole, a slice, a DTensor or empty.

        Raises AdapterError for an unknown name, and for FSDP1 with use_orig_params=False, which registers none.
        """
        modules = self._modules()
        return {name: _parameters(_named(modules, name)) for name in names}

    def _look(self) -> tuple[EngineKinds, dict[str, tuple[LoraModule, FactorSlots]]]:
        """Every module and its slots as they are now."""
        kinds = EngineKinds.of(self._model, self._optimizer)
        kinds.settle()
        modules = self._modules()
        return kinds, {
            n: (module, FactorSlots(kinds.slot(module, "A"), kinds.slot(module, "B"))) for n, module in modules.items()
        }

    def _modules(self) -> dict[str, LoraModule]:
        return lora_modules(self._model, self.adapter_name, moved_base=self._moved_base)


def writer_for(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    optimizer: Any = None,
    initial: Mapping[str, LowRank] | Literal["now"] | None = None,
) -> Writer:
    """Return the writer for a model in one process, under DDP, FSDP1, FSDP2 or DeepSpeed's ZeRO-0, 1, 2 and 3.

    `optimizer` is what the trainer passes to its callbacks (wrapped or not): DeepSpeed's ZeRO-0 in bf16 or fp16 keeps
    its fp32 masters there and nowhere else. `initial` is read for factors that began as a part of the base weight
    (PiSSA, OLoRA) only: those they began with, or "now" where training has not begun. Raises AdapterError where one of
    the two is needed and missing, where the adapter was added after the engine took the model, for DTensors that are
    placed otherwise, and as `live_factors` does.
    """
    bare, optimizer = unwrapped(model, optimizer)
    return LiveWriter(bare, adapter_name, optimizer, initial)


def _check_shapes(module: LoraModule, pair: FactorSlots) -> None:
    """Refuse now what a gather would; no collective."""
    A, B = (torch.empty(slot.shape, dtype=slot.narrow, device="meta") for slot in pair)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or "meta" in (pair.A.device.type, pair.B.device.type):
        module.factors(*(pair.A.tensor, pair.B.tensor))


def _named(modules: Mapping[str, LoraModule], name: str) -> LoraModule:
    if name not in modules:
        raise AdapterError(f"the model has no LoRA module {name!r}{nearest(name, modules)}")
    return modules[name]


def _parameters(module: LoraModule) -> tuple[nn.Parameter, nn.Parameter]:
    A, B = module.A.tensor, module.B.tensor
    if isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter):
        return A, B
    raise AdapterError(
        f"module {module.name!r}: FSDP1 keeps its factors in a flat parameter, so none is their own. Set "
        "fsdp_use_orig_params: true, or use FSDP2."
    )
