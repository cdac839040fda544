"""One LoRA module's factors, and the update that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError
from ..ops import LowRank, accumulation_dtype


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One LoRA module: the update of its weight is `scaling * B @ A`, in map orientation (d_out, d_in).

    A (r, d_in) and B (d_out, r), any floating dtype. Where `transposed`, the checkpoint stores the weight as
    (d_in, d_out): embeddings, and the Conv1D of GPT-2 (`fan_in_fan_out` in PEFT). `initial` is (A₀, B₀) where the
    factors began as a part of the base weight (PiSSA, OLoRA), so that B·A is not what training changed.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    transposed: bool = False
    initial: LowRank | None = None

    @property
    def update(self) -> LowRank:
        """What training changed, divided by `scaling`: B·A, or B·A - B₀·A₀ (rank 2r) where `initial` is set."""
        if self.initial is None:
            return LowRank(self.A, self.B)
        dtype = accumulation_dtype(self.A, self.B)
        A, B, A0, B0 = (t.detach().to(self.A.device, dtype) for t in (self.A, self.B, *self.initial))
        # B·A - B₀·A₀ as (B - B₀)·A + B₀·(A - A₀): large numbers are subtracted first, where it costs no digits.
        return LowRank(torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1))

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        """The number of inputs; the vocabulary size for an embedding."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """The number of outputs."""
        return self.B.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.d_out, self.d_in

    def low_rank(self, unit: float | None = None) -> LowRank:
        """Return the update divided by `unit` (default: by the own scaling), detached.

        The factors themselves, bit for bit, where `unit` is the scaling. Else √|scaling/unit| goes on A and on B,
        the sign on B, in float32 or better. Raises AdapterError when `unit` is zero or not finite.
        """
        A, B = self.A.detach(), self.B.detach()
        if unit is None or unit == self.scaling:
            return LowRank(A, B)
        if unit == 0 or not math.isfinite(unit):
            raise AdapterError(
                f"module {self.name!r}: an update cannot be divided by a scaling of {unit}, with which no factors "
                "change anything. Set lora_alpha (LoraConfig, or adapter_config.json) to a finite number other than 0."
            )
        ratio = self.scaling / unit
        root, dtype = math.sqrt(abs(ratio)), accumulation_dtype(A, B)
        return LowRank(A.to(dtype) * root, B.to(dtype) * math.copysign(root, ratio))
