"""What an adapter's file holds beside its factors: whole tensors, trained rows of embeddings, copies of the base's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterError
from .checkpoint import Adapter
from .names import canonical_name

# Parts that PEFT puts into the path of a tensor of the model. Of several copies of one tensor the first kind counts.
_COPIES = ("modules_to_save", "", "base_layer", "original_module")
_ROWS = "trainable_tokens_delta"
_TOKENS = "token_adapter"
# Names that are listed; the rest is counted.
_LISTED = 3
# Canonical name -> the base model's tensor, or None where it is not at hand.
Base = Callable[[str], Tensor | None]


class Beside(NamedTuple):
    """What an adapter holds of one tensor of the model, by keys in its file.

    `whole` takes the place of the tensor. `rows` (n, d) then take the places of the rows `tokens`. `trained` says that
    the whole tensor was to be trained: not set for what PEFT saves of the base model of its own accord.
    """

    whole: str | None = None
    rows: str | None = None
    tokens: tuple[int, ...] = ()
    trained: bool = False


def beside_factors(adapter: Adapter) -> dict[str, Beside]:
    """Return canonical name -> what `adapter.extra` holds of it; a weight by its module's name, a bias with `.bias`.

    Raises AdapterError where trained rows do not say of which tokens they are.
    """
    wholes: dict[str, tuple[int, str]] = {}
    rows: dict[str, str] = {}
    for key in adapter.extra:
        name, kind = canonical_tensor(key)
        if kind == _ROWS:
            rows[name] = key
        else:
            rank = _COPIES.index(kind)
            wholes[name] = min(wholes.get(name, (rank, key)), (rank, key))
    by_name = {name: Beside(key, trained=_trained(name, rank, adapter.config)) for name, (rank, key) in wholes.items()}
    for name, key in rows.items():
        tokens = _tokens(name, adapter, len(adapter.extra[key]))
        by_name[name] = by_name.get(name, Beside())._replace(rows=key, tokens=tokens)
    return by_name


def left_beside(adapter: Adapter, base: Base) -> list[str]:
    """Return what `adapter` holds beside its factors that is not the base model's, in words."""
    wholes, rows = [], []
    for name, beside in beside_factors(adapter).items():
        there = base(name)
        if beside.whole is not None:
            same = _same(adapter.extra[beside.whole], there)
            if same is False or (same is None and beside.trained):
                wholes.append(name)
        if beside.rows is not None and not _same(adapter.extra[beside.rows], _rows(there, beside)):
            rows.append(f"{name} ({len(beside.tokens)})")
    phrases = [f"trained tensors of {listed(wholes)}"] if wholes else []
    return phrases + ([f"trained rows of tokens in {listed(rows)}"] if rows else [])


def canonical_tensor(key: str) -> tuple[str, str]:
    """Return canonical name and kind (`modules_to_save`, ...) of a tensor of an adapter's file or a PeftModel."""
    parts = key.split(".")
    if parts[-1] == _ROWS:
        return canonical_name(".".join(part for part in parts[:-1] if part != _TOKENS)), _ROWS
    kind = next((copy for copy in _COPIES if copy in parts), "")
    return canonical_name(".".join(part for part in parts if part not in (*_COPIES, _TOKENS))), kind


def _trained(name: str, rank: int, config: Mapping[str, Any]) -> bool:
    """Whether the config says so: PEFT matches `modules_to_save` by the end of a module's path."""
    if name.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    saved = config.get("modules_to_save") or ()
    module = name.removesuffix(".bias")
    return rank <= 1 and any(f".{module}".endswith(str(one)) or f".{one}." in f".{module}." for one in saved)


def _tokens(name: str, adapter: Adapter, count: int) -> tuple[int, ...]:
    """The tokens of trained rows: of a list for the input embedding and what is tied to it, or by module name."""
    indices = adapter.config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        named = [tokens for module, tokens in indices.items() if f".{name}".endswith(f".{module}")]
        indices = named[0] if named else next(iter(indices.values()), None)
    tokens = tuple(indices) if isinstance(indices, list | tuple) else ()
    if len(tokens) != count or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise AdapterError(
            f"adapter {adapter.source!r} holds {count} trained rows of {name!r}, and its config names "
            f"{len(tokens)} tokens (trainable_token_indices={adapter.config.get('trainable_token_indices')!r}). Save "
            "it again with save_pretrained."
        )
    return tokens


def _same(tensor: Tensor, base: Tensor | None) -> bool | None:
    """Whether two tensors are equal in the less exact of their dtypes; None where one is not at hand."""
    if base is None:
        return None
    if tensor.shape != base.shape:
        return False
    there = base.detach().to(tensor.device)
    return torch.equal(tensor.to(there.dtype), there) or torch.equal(there.to(tensor.dtype), tensor)


def _rows(weight: Tensor | None, beside: Beside) -> Tensor | None:
    if weight is None or weight.ndim != 2 or weight.shape[0] <= max(beside.tokens, default=0):
        return None
    return weight.detach()[torch.tensor(beside.tokens, device=weight.device)]


def listed(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"
