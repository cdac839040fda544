"""What an optimizer keeps of a factor: edited after a merge (keep, reset or rescale), or set aside and put back.

Optimizers are known by class and package: none is imported to ask.

Adam's moments describe gradients with respect to the factors of before the merge. The gradient of A is s·Bᵀ·G and
that of B is s·G·Aᵀ, with G that of the weight: so where a merge changes a factor's norm and leaves its direction, it is
the *other* factor's gradients that scale by that ratio: first moments by it, second by its square (`rescale`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters import LoraFactors
from ..adapters.snapshot import norms_of, norms_of_pairs
from ..errors import ConfigError
from ..io.choices import one_of
from ..ops import LowRank, full_precision
from .faults import Fault, attempt
from .writers import Writer
from .writers.zero import master_pairs, wrapped

POLICIES = ("keep", "reset", "rescale")


@dataclass(frozen=True)
class OptimizerKind:
    """A family of optimizers: `powers` says by which power of the gradient each moment of a parameter scales.

    `copy` names a state that is a second copy of the weights, which only a `reset` can take along.
    """

    powers: Mapping[str, int]
    copy: str | None = None

    @property
    def policies(self) -> tuple[str, ...]:
        """What it can follow."""
        return ("reset",) if self.copy else POLICIES


ADAM = OptimizerKind({"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2})
# bitsandbytes numbers Adam's two moments.
NUMBERED = OptimizerKind({"state1": 1, "state2": 2})
# Its first moment, where it keeps one, is of updates: those do not scale with the gradient.
FACTORED = OptimizerKind({"exp_avg": 0, "exp_avg_sq": 2, "exp_avg_sq_row": 2, "exp_avg_sq_col": 2})
SCHEDULE_FREE = OptimizerKind({}, copy="z")
KINDS = {
    "torch.Adam": ADAM,
    "torch.AdamW": ADAM,
    "torch.SGD": OptimizerKind({"momentum_buffer": 1}),
    "torch.Adafactor": OptimizerKind({"row_var": 2, "col_var": 2, "variance": 2}),
    "transformers.Adafactor": FACTORED,
    "bitsandbytes.Adam": NUMBERED,
    "bitsandbytes.AdamW": NUMBERED,
    "deepspeed.FusedAdam": ADAM,
    "deepspeed.DeepSpeedCPUAdam": ADAM,
    "schedulefree.AdamWScheduleFree": SCHEDULE_FREE,
    "schedulefree.RAdamScheduleFree": SCHEDULE_FREE,
    "schedulefree.SGDScheduleFree": SCHEDULE_FREE,
}
_VARIANTS = ("Paged", "8bit", "32bit")
# What DeepSpeed keeps of a parameter.
_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def kind_for(optimizer: Any, policy: str) -> OptimizerKind | None:
    """Return how the states of `optimizer` (wrapped or not) follow `policy`; None where `keep` leaves them alone.

    Raises ConfigError for a policy that does not exist, and for an optimizer that cannot follow it. `keep` takes all
    but the schedule-free ones, whose second copy of the weights would partly undo every merge.
    """
    one_of(policy, POLICIES, "optimizer_state")
    layers = list(wrapped(optimizer))
    if not layers:
        return None
    inner = type(layers[-1])
    kind = KINDS.get(f"{inner.__module__.partition('.')[0]}.{_plain(inner.__name__)}")
    if "ScheduleFree" in inner.__name__:
        kind = kind if policy == "reset" and len(layers) <= 2 else None
        if kind is None:
            raise ConfigError(_copies_weights(inner.__name__, policy))
        return kind
    if policy == "keep":
        return None
    if kind is None or not _reachable(layers, kind):
        raise ConfigError(_cannot(layers, policy))
    return kind


def _reachable(layers: list[Any], kind: OptimizerKind) -> bool:
    """Whether the states are where they are looked for: DeepSpeed's own wrappers keep those of Adam only."""
    engine = any(type(layer).__module__.startswith("deepspeed.runtime") for layer in layers[:-1])
    flat = any(getattr(layer, "fp32_groups_flat", None) for layer in layers)
    return not flat and (kind is ADAM or not engine)


def _copies_weights(name: str, policy: str) -> str:
    return (
        f"optimizer {name} trains a copy of the weights beside the parameters, which would undo a part of every merge "
        f"under optimizer_state={policy!r}: set optimizer_state='reset' (without DeepSpeed), use AdamW, or "
        "gate='watch' and merge after training with `safemerge merge`"
    )


def _cannot(layers: list[Any], policy: str) -> str:
    names = " in ".join(type(layer).__name__ for layer in reversed(layers))
    allowed = [name for name, kind in KINDS.items() if policy in kind.policies]
    return (
        f"optimizer {names} has no state that optimizer_state={policy!r} can edit: use one of {allowed} (bitsandbytes' "
        "8-bit and paged ones too; in DeepSpeed an Adam of torch's or its own), or optimizer_state='keep'"
    )


def _plain(name: str) -> str:
    for variant in _VARIANTS:
        name = name.replace(variant, "")
    return name


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
    kind, pairs = kind_for(optimizer, policy), list(parameters)
    if kind is None:
        return 0
    if policy == "rescale":
        _refuse_scales([scale for _, scale in pairs])
    # ZeRO-0 keeps a half-precision parameter's state by its fp32 master.
    masters = {id(parameter): master for parameter, master in master_pairs(optimizer)}
    states = list(wrapped(optimizer))[-1].state
    # A gradient that has become 0 left nothing to go on: second moments of 0 need a new step count too.
    return sum(
        _edit(p, masters.get(id(p), p), scale if policy == "rescale" else 0.0, kind, states) for p, scale in pairs
    )


def _refuse_scales(scales: list[float]) -> None:
    wrong = [scale for scale in scales if not (math.isfinite(scale) and scale >= 0)]
    if wrong:
        raise ConfigError(f"a gradient's scale is {wrong[0]}: give a finite number of at least 0; nothing was edited")


def _edit(parameter: Any, master: Any, scale: float, kind: OptimizerKind, states: MutableMapping[Any, Any]) -> int:
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


def copy_optimizer_states(optimizer: Any, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Copy what `edit_optimizer_states` may change of these parameters; return what puts it back in place.

    Every rank copies and puts back what it holds: no collective. A parameter without state yet has nothing to copy.
    """
    masters = {id(parameter): master for parameter, master in master_pairs(optimizer)}
    states = list(wrapped(optimizer))[-1].state
    actions = [_copied(p, masters.get(id(p), p), states) for p in parameters]

    def put_back() -> None:
        for action in actions:
            action()

    return put_back


def _copied(parameter: Any, master: Any, states: MutableMapping[Any, Any]) -> Callable[[], None]:
    if hasattr(parameter, "ds_id"):
        return _copied_partition(parameter)
    if hasattr(parameter, "_hp_mapping"):
        fragments = getattr(parameter._hp_mapping, "optim_fragment", None) or {}
        return _put_into(fragments, _copies({key: fragments[key] for key in _ADAM_MOMENTS if key in fragments}))
    state = states.get(master) or {}
    return _put_into(state, _copies(state))


def _copied_partition(parameter: Any) -> Callable[[], None]:
    """ZeRO-3 keeps this rank's part wherever it likes, so that it has to be asked and told."""
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    parts = {key: safe_get_local_optimizer_state(parameter, key) for key in _ADAM_MOMENTS}
    copies = {key: part.clone() for key, part in parts.items() if part is not None}

    def put_back() -> None:
        for key, part in copies.items():
            safe_set_local_optimizer_state(parameter, part, key)

    return put_back


def _copies(state: MutableMapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _put_into(state: MutableMapping[str, Any], copies: MutableMapping[str, Any]) -> Callable[[], None]:
    def put_back() -> None:
        for key, value in copies.items():
            if isinstance(value, Tensor):
                state[key].copy_(value)
            else:
                state[key] = value

    return put_back


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
