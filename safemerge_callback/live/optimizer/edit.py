"""The optimizer's moments of parameters that a merge has edited: keep, reset or rescale them.

Adam's moments describe gradients with respect to the factors of before the merge. The gradient of A is s·Bᵀ·G and
that of B is s·G·Aᵀ, with G that of the weight: so where a merge changes a factor's norm and leaves its direction, it is
the *other* factor's gradients that scale by that ratio: first moments by it, second by its square (`rescale`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ...ops import full_precision
from ..writers.zero import master_pairs, wrapped
from .kinds import POLICIES, Kind, kind_for

__all__ = ["POLICIES", "check_optimizer", "edit_optimizer_states"]


def check_optimizer(optimizer: Any, policy: str) -> None:
    """Raise ConfigError for an optimizer whose state cannot be treated as `policy` says, or that no merge may touch.

    `reset` and `rescale` take torch's, bitsandbytes' and DeepSpeed's Adam and AdamW, torch's SGD, and the Adafactor of
    torch and of transformers; a schedule-free optimizer takes `reset` alone; any other goes with `keep`.
    """
    kind_for(optimizer, policy)


@full_precision()
def edit_optimizer_states(optimizer: Any, parameters: Iterable[tuple[nn.Parameter, float]], policy: str) -> int:
    """Edit the moments of each parameter, whose gradients have scaled by the number beside it; return how many.

    `reset`: as if the parameter had not been trained, its own step count included, since zero moments with an old bias
    correction would make the next step (1 - β₁)/√(1 - β₂), about 3.2, times too long, and the tenth 6.5 times.
    DeepSpeed counts steps for all parameters together, so there the first moment alone is reset; of a schedule-free
    optimizer the second copy of the weights becomes the merged ones. Every rank edits what it holds: no collective. A
    parameter without state yet is left alone. Raises ConfigError as `check_optimizer`, and for a scale below 0 or not
    finite; nothing was edited then.
    """
    kind, given = kind_for(optimizer, policy), list(parameters)
    if kind is None:
        return 0
    if policy == "rescale":
        _refuse_scales([scale for _, scale in given])
    # ZeRO-0 keeps a half-precision parameter's state by its fp32 master.
    masters = {id(parameter): master for parameter, master in master_pairs(optimizer)}
    states = list(wrapped(optimizer))[-1].state
    # A gradient that has become 0 left nothing to go on: second moments of 0 need a new step count too.
    return sum(
        _edit(p, masters.get(id(p), p), scale if policy == "rescale" else 0.0, kind, states) for p, scale in given
    )


def _refuse_scales(scales: list[float]) -> None:
    wrong = [scale for scale in scales if not (math.isfinite(scale) and scale >= 0)]
    if wrong:
        raise ConfigError(f"a gradient's scale is {wrong[0]}: give a finite number of at least 0; nothing was edited")


def _edit(parameter: Any, master: Any, scale: float, kind: Kind, states: MutableMapping[Any, Any]) -> int:
    """Edit one parameter's state; `scale` 0 resets it."""
    if hasattr(parameter, "ds_id"):
        return _edit_partition(parameter, scale)
    if hasattr(parameter, "_hp_mapping"):
        return _edit_fragment(parameter, scale)
    state = states.get(master) or {}
    if kind.copy:
        return _copy_weights(state, kind.copy, parameter)
    moments = [key for key in kind.powers if isinstance(state.get(key), Tensor)]
    for key in moments:
        _scale(state, key, scale ** kind.powers[key] if scale else 0.0)
    if not scale and "step" in state:
        state["step"] = state["step"].zero_() if isinstance(state["step"], Tensor) else 0
    return len(moments)


def _copy_weights(state: MutableMapping[str, Any], key: str, parameter: Tensor) -> int:
    """Let both copies be the merged weights; the second moment stays, as its step count is that of all parameters."""
    if key not in state:
        return 0
    state[key].copy_(parameter)
    return 1


def _scale(state: MutableMapping[str, Any], key: str, factor: float) -> None:
    """Scale a moment in place; of one in eight bits, the scales of its blocks."""
    moment = state[key]
    if not moment.dtype.is_floating_point:
        blocks = f"absmax{key[-1]}"
        if blocks not in state:
            raise ConfigError(f"moment {key!r} is {moment.dtype} without {blocks!r}: set optimizer_state='keep'")
        moment = state[blocks]
    moment.mul_(factor)


def _edit_fragment(parameter: Any, scale: float) -> int:
    """ZeRO-1 and ZeRO-2: views into this rank's flat moments; None where another rank has the whole parameter."""
    fragments = getattr(parameter._hp_mapping, "optim_fragment", None) or {}
    chosen = {key: factor for key, factor in _shared_step(scale).items() if key in fragments}
    for key, factor in chosen.items():
        fragments[key].mul_(factor)
    return len(chosen)


def _edit_partition(parameter: Any, scale: float) -> int:
    """ZeRO-3: this rank's part of the flat moments, wherever they are kept."""
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    edited = 0
    for key, factor in _shared_step(scale).items():
        part = safe_get_local_optimizer_state(parameter, key)
        if part is not None:
            safe_set_local_optimizer_state(parameter, part * factor, key)
            edited += 1
    return edited


def _shared_step(scale: float) -> dict[str, float]:
    """Factors of the moments of Adam where the step count is not the parameter's own."""
    return {"exp_avg": scale, "exp_avg_sq": scale**2} if scale else {"exp_avg": 0.0}
