"""What the safety adapter itself reads: the measure that gate `reference` compares with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..adapters import Adapter, LoraFactors
from ..subspace import Subspace
from .fit import check_safety_adapter
from .measure import measure


def own_cosines(
    safety: Adapter,
    factors: Mapping[str, LoraFactors],
    subspace: Subspace,
    *,
    device: torch.device | str | None = None,
    batch_bytes: int | None = None,
) -> dict[str, float]:
    """Return the safety adapter's own cosine in each module of `factors`, in [0, 1]; NaN where it has not moved.

    Exact, from the file beside a compressed subspace. One measure: it never changes, so do it once. `batch_bytes` is as
    `measure` has it. Raises AdapterError for a safety adapter that does not fit `factors`, and SubspaceError as
    `measure`.
    """
    check_safety_adapter(safety, factors)
    own = {name: replace(safety.factors[name], transposed=live.transposed) for name, live in factors.items()}
    found = measure(own, subspace, device=device, batch_bytes=batch_bytes)
    return {name: math.nan if r.update_norm == 0 else r.cosine for name, r in found.items()}
