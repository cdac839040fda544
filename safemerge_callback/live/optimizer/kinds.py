"""Which optimizers' states can follow a merge, told by class and package: no optimizer is imported to ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...io.choices import one_of
from ..writers.zero import wrapped

POLICIES = ("keep", "reset", "rescale")


@dataclass(frozen=True)
class Kind:
    """A family of optimizers: `powers` says by which power of the gradient each moment of a parameter scales.

    `copy` names a state that is a second copy of the weights, which only a `reset` can take along.
    """

    powers: Mapping[str, int]
    copy: str | None = None

    @property
    def policies(self) -> tuple[str, ...]:
        """What it can follow."""
        return ("reset",) if self.copy else POLICIES


ADAM = Kind({"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2})
# bitsandbytes numbers Adam's two moments.
NUMBERED = Kind({"state1": 1, "state2": 2})
# Its first moment, where it keeps one, is of updates: those do not scale with the gradient.
FACTORED = Kind({"exp_avg": 0, "exp_avg_sq": 2, "exp_avg_sq_row": 2, "exp_avg_sq_col": 2})
SCHEDULE_FREE = Kind({}, copy="z")
KINDS = {
    "torch.Adam": ADAM,
    "torch.AdamW": ADAM,
    "torch.SGD": Kind({"momentum_buffer": 1}),
    "torch.Adafactor": Kind({"row_var": 2, "col_var": 2, "variance": 2}),
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


def kind_for(optimizer: Any, policy: str) -> Kind | None:
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


def _reachable(layers: list[Any], kind: Kind) -> bool:
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
