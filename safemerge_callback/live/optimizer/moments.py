"""What a merge did to a module's factors is told to the optimizer, as the setting says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...adapters import LoraFactors
from ...adapters.snapshot import norms_of, norms_of_pairs
from ...ops import LowRank
from .. import Writer
from ..faults import Fault, attempt
from .edit import edit_optimizer_states


def edit_moments(
    writer: Writer, optimizer: Any, policy: str, before: Mapping[str, LowRank], after: Mapping[str, LoraFactors]
) -> int | Fault:
    """Edit the moments of the modules in `before`; return how many parameters had some, or what went wrong.

    `policy` is keep, reset or rescale. Nothing is done for keep, nor without an optimizer. Raises ProcessesError alone.
    """
    if optimizer is None or policy == "keep":
        return 0
    old, new = norms_of_pairs(before), norms_of(after)

    def edit() -> int:
        # A factor's gradient goes with the norm of the other one.
        scaled = [
            (parameter, now / then if then > 0 else 1.0)
            for name, pair in writer.parameters(after).items()
            for parameter, now, then in zip(pair, reversed(new[name]), reversed(old[name]), strict=True)
        ]
        return edit_optimizer_states(optimizer, scaled, policy)

    return attempt("optimizer_state", edit)
