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
from ..modules import Site, active_adapter, base_moved, lora_sites
from ..ranks import together
from .commit import Pair, commit, read_all
from .kinds import Kinds, unwrapped


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
        self.sharded = Kinds.of(model, optimizer).sharded
        self.initial: Mapping[str, LowRank] = {}
        _, pairs = self._look()
        for site, pair in pairs.values():
            _check_shapes(site, pair)
        if self._moved_base:
            self.initial = initial_factors(self.gather()) if isinstance(initial, str) else dict(initial or {})
            since(self.gather(), self.initial)

    def gather(self) -> dict[str, LoraFactors]:
        """Return canonical name -> whole factors, detached: fp32 masters where there are, else in the live dtype.

        Collective where an engine shards or keeps masters in fragments; the live tensors themselves, not copied, where
        they are whole. Beside the factors, one FSDP1 unit or one parameter at a time is held.
        """
        # All ranks look before any gathers, so that one whose model is refused leaves no other waiting.
        _, pairs = together(self._look) if self.sharded else self._look()
        tensors = read_all([slot for _, pair in pairs.values() for slot in pair])
        wholes = zip(pairs.values(), tensors[::2], tensors[1::2], strict=True)
        factors = {site.name: site.factors(A, B) for (site, _), A, B in wholes}
        return since(factors, self.initial) if self.initial else factors

    def write(self, new: Mapping[str, LowRank]) -> None:
        """Replace the factors of the modules in `new`, all or none: A (r, d_in), B (d_out, r), in the live units.

        Collective with many processes: rank 0's values are cast once and written on every rank, into master and
        low-precision copy. Raises as `commit` does, on every rank.
        """
        _, pairs = together(self._look)
        commit({name: pair for name, (_, pair) in pairs.items()}, new)

    def parameters(self, names: Iterable[str]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return name -> the (A, B) Parameters as the model registers them: whole, a slice, a DTensor or empty.

        Raises AdapterError for an unknown name, and for FSDP1 with use_orig_params=False, which registers none.
        """
        sites = self._sites()
        return {name: _parameters(_named(sites, name)) for name in names}

    def _look(self) -> tuple[Kinds, dict[str, tuple[Site, Pair]]]:
        """Every module's site and slots as they are now."""
        kinds = Kinds.of(self._model, self._optimizer)
        kinds.settle()
        sites = self._sites()
        return kinds, {n: (site, Pair(kinds.slot(site, "A"), kinds.slot(site, "B"))) for n, site in sites.items()}

    def _sites(self) -> dict[str, Site]:
        return lora_sites(self._model, self.adapter_name, moved_base=self._moved_base)


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


def _check_shapes(site: Site, pair: Pair) -> None:
    """Refuse now what a gather would; no collective."""
    A, B = (torch.empty(slot.shape, dtype=slot.narrow, device="meta") for slot in pair)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or "meta" in (pair.A.device.type, pair.B.device.type):
        site.factors(*(pair.A.tensor, pair.B.tensor))


def _named(sites: Mapping[str, Site], name: str) -> Site:
    if name not in sites:
        raise AdapterError(f"the model has no LoRA module {name!r}{nearest(name, sites)}")
    return sites[name]


def _parameters(site: Site) -> tuple[nn.Parameter, nn.Parameter]:
    A, B = site.A.tensor, site.B.tensor
    if isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter):
        return A, B
    raise AdapterError(
        f"module {site.name!r}: FSDP1 keeps its factors in a flat parameter, so none is their own. Set "
        "fsdp_use_orig_params: true, or use FSDP2."
    )
