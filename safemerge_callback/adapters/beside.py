"""What an adapter's file holds beside its factors: whole tensors, trained rows of embeddings, copies of the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import AdapterError
from .checkpoint import Adapter
from .names import canonical_name

# Parts that PEFT puts into the path of a tensor of the model. Of several copies of one tensor the first kind counts.
_COPIES = ("modules_to_save", "", "base_layer", "original_module")
_ROWS = "trainable_tokens_delta"
_TOKENS = "token_adapter"


class Beside(NamedTuple):
    """What an adapter holds of one tensor of the model, by keys in its file.

    `whole` takes the place of the tensor. `rows` (n, d) then take the places of the rows `tokens`. `trained` says that
    training changed it, and is not set for what PEFT saves of the base model of its own accord (resized embeddings).
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
        name, kind = _name_and_kind(key)
        if kind == _ROWS:
            rows[name] = key
        else:
            rank = _COPIES.index(kind)
            wholes[name] = min(wholes.get(name, (rank, key)), (rank, key))
    found = {name: Beside(key, trained=_trained(name, rank, adapter.config)) for name, (rank, key) in wholes.items()}
    for name, key in rows.items():
        tokens = _tokens(name, adapter, len(adapter.extra[key]))
        found[name] = found.get(name, Beside())._replace(rows=key, tokens=tokens, trained=True)
    return found


def _name_and_kind(key: str) -> tuple[str, str]:
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
    given = adapter.config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        named = [tokens for module, tokens in given.items() if f".{name}".endswith(f".{module}")]
        given = named[0] if named else next(iter(given.values()), None)
    tokens = tuple(given) if isinstance(given, list | tuple) else ()
    if len(tokens) != count or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise AdapterError(
            f"adapter {adapter.source!r} holds {count} trained rows of {name!r}, and its config names "
            f"{len(tokens)} tokens (trainable_token_indices={adapter.config.get('trainable_token_indices')!r}). Save "
            "it again with save_pretrained."
        )
    return tokens
