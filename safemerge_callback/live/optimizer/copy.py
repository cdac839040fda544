"""The optimizer's state of a few parameters, set aside so that it can be put back as it was, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from torch import Tensor, nn

from ..writers.zero import master_pairs, wrapped

_ADAM = ("exp_avg", "exp_avg_sq")


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
        return _put_into(fragments, _copies({key: fragments[key] for key in _ADAM if key in fragments}))
    state = states.get(master) or {}
    return _put_into(state, _copies(state))


def _copied_partition(parameter: Any) -> Callable[[], None]:
    """ZeRO-3 keeps this rank's part wherever it likes, so that it has to be asked and told."""
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    parts = {key: safe_get_local_optimizer_state(parameter, key) for key in _ADAM}
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
