"""How a live model's factors are read and replaced; the only place that asks how the model is sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from torch import nn

from ...adapters.factors import LoraFactors
from ...ops import LowRank
from .kinds import unwrapped
from .writer import LiveWriter

__all__ = ["LiveWriter", "Writer", "writer_for"]


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
