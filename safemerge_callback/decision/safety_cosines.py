"""What the safety adapter itself reads: a measure that gates may compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from ..adapters import Adapter, LoraFactors
from ..subspace import Subspace
from .fit import check_safety_adapter
from .gates import Gate
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


def cosines_needed(
    gates: Iterable[Gate],
    safety: Sequence[Adapter],
    factors: Mapping[str, LoraFactors],
    subspace: Subspace,
    *,
    device: torch.device | str | None = None,
    batch_bytes: int | None = None,
) -> dict[str, float] | None:
    """Return `own_cosines` of the first safety adapter where one of `gates` needs them; None where none does.

    None, too, where there is no safety adapter.
    """
    if not safety or not any("safety_cosines" in gate.criterion.needs for gate in gates):
        return None
    return own_cosines(safety[0], factors, subspace, device=device, batch_bytes=batch_bytes)
