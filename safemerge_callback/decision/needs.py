"""What gate, method and weights rules need to be there, and which of them says so: asked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..methods.how import How
from .gates import Gate
from .weights import rules_in_force


def needs_of(how: How | None, gate: Gate, rules: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return need -> who has it, in words, of all that a merge needs; `how` None says nothing.

    `subspace`: alignment matrices to multiply with; `bases`: instead of them. `safety_adapter`. `safety_cosines`: what
    the safety adapter itself reads. `average`: of the run's own updates. `one_merge`: that it happens once.
    `safety_batch`, `task_batch`, `grams` and the names of module signals: of a live model, as `signals.check_data` has
    them.
    """
    claims = [] if how is None else [(f"method {how.method!r}", how.needs)]
    claims += [(f"gate {gate.name!r}", gate.needs)]
    claims += [(f"weights rule {rule.name!r}", rule.needs) for rule, _ in rules_in_force(rules or {}, gate)]
    # The first that needs it is named.
    return {need: who for who, needs in reversed(claims) for need in needs}
