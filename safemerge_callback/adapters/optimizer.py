"""The optimizer's moments of parameters that a merge has edited: keep, reset or rescale them.

Adam's moments describe gradients with respect to the factors of before the merge. The gradient of A is s·Bᵀ·G and
that of B is s·G·Aᵀ, with G that of the weight: so where a merge changes a factor's norm and leaves its direction, it is
the *other* factor's gradients that scale by that ratio: first moments by it, second by its square (`rescale`).
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, nearest
from .writers.zero import master_pairs, wrapped

POLICIES = ("keep", "reset", "rescale")
# By which power of the gradient a moment scales. bitsandbytes numbers the two of Adam.
POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1, "state1": 1, "state2": 2}
EDITABLE = ("Adam", "AdamW", "SGD", "FusedAdam", "DeepSpeedCPUAdam")
_VARIANTS = ("Paged", "8bit", "32bit")


def check_optimizer(optimizer: Any, policy: str) -> None:
    """Raise ConfigError for an optimizer whose state cannot be treated as `policy` says, or that no merge may touch.

    Any optimizer goes with `keep`, but those that train a second copy of the weights (schedule-free), to which an edit
    of the parameters would be lost. `reset` and `rescale` take torch's, bitsandbytes' and DeepSpeed's Adam and AdamW,
    and torch's SGD: factored states (Adafactor) and others have no moments of a parameter's own.
    """
    if policy not in POLICIES:
        raise ConfigError(
            f"optimizer_state is {policy!r}: choose one of {list(POLICIES)}{nearest(str(policy), POLICIES)}"
        )
    layers = list(wrapped(optimizer))
    names = [type(layer).__name__ for layer in layers]
    if any("ScheduleFree" in name for name in names):
        raise ConfigError(
            f"optimizer {names[-1]} trains a copy of the weights beside the parameters, so a merge would be undone "
            "step by step: use AdamW, or gate='watch' and merge after training with `safemerge merge`"
        )
    if policy == "keep" or not layers:
        return
    if _plain_name(names[-1]) not in EDITABLE or any(getattr(layer, "fp32_groups_flat", None) for layer in layers):
        raise ConfigError(
            f"optimizer {' in '.join(reversed(names))} has no state that optimizer_state={policy!r} can edit: use one "
            f"of {list(EDITABLE)} (bitsandbytes' variants too), or optimizer_state='keep'"
        )


@torch.no_grad()
def edit_optimizer_states(optimizer: Any, parameters: Iterable[tuple[nn.Parameter, float]], policy: str) -> int:
    """Edit the moments of each parameter, whose gradients have scaled by the number beside it; return how many.

    `reset`: as if the parameter had not been trained, its own step count included, since zero moments with an old bias
    correction would make the next step (1 - β₁)/√(1 - β₂), about 3.2, times too long. DeepSpeed counts steps for all
    parameters together, so there the first moment alone is reset. Every rank edits what it holds: no collective. A
    parameter without state yet is left alone. Raises ConfigError for a state of an unknown kind.
    """
    if policy == "keep":
        return 0
    # ZeRO-0 keeps a half-precision parameter's state by its fp32 master.
    masters = {id(parameter): master for parameter, master in master_pairs(optimizer)}
    states = list(wrapped(optimizer))[-1].state
    return sum(_edit(masters.get(id(p), p), scale, policy, states) for p, scale in parameters)


def _edit(parameter: Any, scale: float, policy: str, states: MutableMapping[Any, Any]) -> int:
    if hasattr(parameter, "ds_id"):
        return _edit_partition(parameter, scale, policy)
    if hasattr(parameter, "_hp_mapping"):
        return _edit_fragment(parameter, scale, policy)
    state = states.get(parameter) or {}
    moments = _moments(state)
    for key in moments:
        _scale(state, key, 0.0 if policy == "reset" else scale ** POWERS[key])
    if policy == "reset" and "step" in state:
        state["step"] = state["step"].zero_() if isinstance(state["step"], Tensor) else 0
    return len(moments)


def _scale(state: MutableMapping[str, Any], key: str, factor: float) -> None:
    """Scale a moment in place; of one in eight bits, the scales of its blocks."""
    moment = state[key]
    if not moment.dtype.is_floating_point:
        blocks = f"absmax{key[-1]}"
        if blocks not in state:
            raise ConfigError(f"moment {key!r} is {moment.dtype} without {blocks!r}: set optimizer_state='keep'")
        moment = state[blocks]
    moment.mul_(factor)


def _edit_fragment(parameter: Any, scale: float, policy: str) -> int:
    """ZeRO-1 and ZeRO-2: views into this rank's flat moments; None where another rank has the whole parameter."""
    fragments = getattr(parameter._hp_mapping, "optim_fragment", None) or {}
    chosen = {key: factor for key, factor in _shared_step(scale, policy).items() if key in fragments}
    for key, factor in chosen.items():
        fragments[key].mul_(factor)
    return len(chosen)


def _edit_partition(parameter: Any, scale: float, policy: str) -> int:
    """ZeRO-3: this rank's part of the flat moments, wherever they are kept."""
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    edited = 0
    for key, factor in _shared_step(scale, policy).items():
        part = safe_get_local_optimizer_state(parameter, key)
        if part is not None:
            safe_set_local_optimizer_state(parameter, part * factor, key)
            edited += 1
    return edited


def _shared_step(scale: float, policy: str) -> dict[str, float]:
    """Factors of the moments of Adam where the step count is not the parameter's own."""
    return {"exp_avg": 0.0} if policy == "reset" else {"exp_avg": scale, "exp_avg_sq": scale**2}


def _moments(state: MutableMapping[str, Any]) -> list[str]:
    return [key for key in POWERS if isinstance(state.get(key), Tensor)]


def _plain_name(name: str) -> str:
    for variant in _VARIANTS:
        name = name.replace(variant, "")
    return name
