"""What each tensor of a baked checkpoint is made of; apart from the baking: known from headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..adapters import Adapter, canonical_name
from ..adapters.beside import Beside, beside_factors
from ..adapters.names import EMBEDDINGS, is_vocabulary
from ..adapters.tensor_file import Spec
from ..errors import AdapterError
from ..io.documents import read_json

HEAD = "lm_head"
CONFIG = "config.json"
_ADVICE = "give the base model that it was trained on"


class BakedTensor(NamedTuple):
    """One tensor: that of the base or a whole one of the adapter, then trained rows, then the update of `module`.

    `source` is the key in the base's shard; `spec` what the tensor will be.
    """

    source: str
    spec: Spec
    beside: Beside = Beside()
    module: str | None = None


class Blueprint(NamedTuple):
    """Shard -> key -> what it is made of; `untied` where a tied head becomes a tensor of its own.

    `vocabulary` is the number of tokens before and after, where the adapter was trained on a resized vocabulary.
    """

    shards: Mapping[str, Mapping[str, BakedTensor]]
    untied: bool = False
    vocabulary: tuple[int, int] | None = None


def blueprint(adapter: Adapter, shapes: Mapping[str, Mapping[str, Spec]], embedding: str | None) -> Blueprint:
    """Return how `adapter` is added into the checkpoint whose shards hold `shapes`; nothing of it is read.

    `embedding` is the input embedding that the output head is tied to, None where the two are apart. Raises
    AdapterError for modules that the checkpoint lacks or has in another shape.
    """
    beside = beside_factors(adapter)
    names = {canonical_name(key) for specs in shapes.values() for key in specs}
    _require_names(adapter, beside, names | ({HEAD} if embedding else set()))
    untied = embedding is not None and _differ(adapter, beside, embedding)
    if embedding is not None:
        beside[HEAD] = _of_head(beside, embedding, untied)
    shards: dict[str, dict[str, BakedTensor]] = {file: {} for file in shapes}
    for file, specs in shapes.items():
        for key, spec in specs.items():
            name = canonical_name(key)
            shards[file][key] = _baked_tensor(adapter, name, key, spec, beside)
            if untied and name == embedding and HEAD not in names:
                shards[file][f"{HEAD}.weight"] = _baked_tensor(adapter, HEAD, key, spec, beside)
    return Blueprint(shards, untied, _vocabulary(adapter, shapes, shards))


def _require_names(adapter: Adapter, beside: Mapping[str, Beside], known: set[str]) -> None:
    lacking = [name for name in (*adapter.factors, *beside) if name not in known]
    if lacking:
        raise AdapterError(
            f"adapter {adapter.source!r} changes {len(lacking)} modules that the base model lacks, the first is "
            f"{lacking[0]!r}: {_ADVICE}"
        )


def _differ(adapter: Adapter, beside: Mapping[str, Beside], embedding: str) -> bool:
    """Whether the adapter has something else for the head than for the embedding that it is tied to."""
    if {HEAD, embedding} & adapter.factors.keys():
        return True
    one, other = beside.get(embedding, Beside()), beside.get(HEAD, Beside())
    pairs = [(one.whole, other.whole), *([(one.rows, other.rows)] if other.rows else [])]
    return any(
        (a is None) != (b is None) or (a is not None and b is not None and not _equal(adapter, a, b)) for a, b in pairs
    )


def _equal(adapter: Adapter, one: str, other: str) -> bool:
    a, b = adapter.extra[one], adapter.extra[other]
    return a.shape == b.shape and torch.equal(a, b)


def _of_head(beside: Mapping[str, Beside], embedding: str, untied: bool) -> Beside:
    """PEFT gives the rows that it trains of a tied embedding to the head too."""
    head, tied = beside.get(HEAD, Beside()), beside.get(embedding, Beside())
    if not untied:
        return tied
    return head if head.rows else head._replace(rows=tied.rows, tokens=tied.tokens)


def _baked_tensor(adapter: Adapter, name: str, key: str, spec: Spec, beside: Mapping[str, Beside]) -> BakedTensor:
    substitute = beside.get(name, Beside())
    shape = spec.shape
    if substitute.whole is not None:
        shape = tuple(adapter.extra[substitute.whole].shape)
        if shape != spec.shape and not (is_vocabulary(name) and shape[1:] == spec.shape[1:]):
            raise AdapterError(
                f"adapter {adapter.source!r} holds {name!r} as {shape}, and the base model as {spec.shape}: {_ADVICE}"
            )
    if substitute.tokens and max(substitute.tokens) >= shape[0]:
        raise AdapterError(
            f"adapter {adapter.source!r} has a trained row for token {max(substitute.tokens)}, and {name!r} has "
            f"{shape[0]} rows: save it again with save_pretrained(..., save_embedding_layers=True), which keeps "
            "resized embeddings"
        )
    module = name if name in adapter.factors and not key.endswith(".bias") else None
    if module is not None:
        _require_shape(adapter, name, key, Spec(spec.dtype, shape))
    return BakedTensor(key, Spec(spec.dtype, shape), substitute, module)


def _require_shape(adapter: Adapter, name: str, key: str, spec: Spec) -> None:
    module = adapter.factors[name]
    wanted = module.shape[::-1] if module.transposed else module.shape
    if spec.shape != wanted or not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
        raise AdapterError(
            f"module {name!r}: the update of adapter {adapter.source!r} is {wanted} and the base model has {key!r} as "
            f"{spec.shape} of {spec.dtype}: {_ADVICE}, unquantised"
        )


def _vocabulary(
    adapter: Adapter, shapes: Mapping[str, Mapping[str, Spec]], shards: Mapping[str, Mapping[str, BakedTensor]]
) -> tuple[int, int] | None:
    """The number of rows before and after, where an embedding was resized; all that have a row a token must be."""
    parts = {
        key: part for shard in shards.values() for key, part in shard.items() if is_vocabulary(canonical_name(key))
    }
    specs = {key: spec for shard in shapes.values() for key, spec in shard.items()}
    resized = {key: part for key, part in parts.items() if part.spec.shape != specs[part.source].shape}
    if not resized:
        return None
    first = next(iter(resized))
    before, after = specs[resized[first].source].shape[0], resized[first].spec.shape[0]
    left = [key for key, part in parts.items() if part.spec.shape[0] == before]
    if left:
        raise AdapterError(
            f"adapter {adapter.source!r} resizes {first!r} from {before} to {after} rows and leaves {left[0]!r} as it "
            "is: save it again with save_pretrained(..., save_embedding_layers=True), which keeps both"
        )
    return before, after


def tied_embedding(folder: Path, names: Iterable[str], touched: Iterable[str]) -> str | None:
    """Return the name of the input embedding where it is tied to the head; None where the two are apart.

    AdapterError for a tied model of unknown names of which an adapter has `touched` one of the two.
    """
    there = {*names}
    named = sorted(name for name in there if name.rpartition(".")[2] in EMBEDDINGS)
    if not _tied(read_config(folder), HEAD in there) or not {HEAD, *named} & {*touched}:
        return None
    if len(named) != 1:
        raise AdapterError(
            "the base model's head and embedding are one tensor, the adapter changes one of them, and which is not "
            f"clear among {named}: train the adapter without them, or untie the model first"
        )
    return named[0]


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json in `folder` holds, empty where there is none; AdapterError where it cannot be read."""
    path = folder / CONFIG
    if not path.exists():
        return {}
    config = read_json(path, f"base model's {str(path)!r}", error=AdapterError, advice="Fetch or save it again.")
    return config if isinstance(config, dict) else {}


def _parts(config: Mapping[str, Any]) -> Iterator[Any]:
    """The configuration, and those of its parts (`text_config`)."""
    yield config
    yield from (part for part in config.values() if isinstance(part, dict))


def _tied(config: Mapping[str, Any], has_head: bool) -> bool:
    """What the configuration says; where it is silent, tied is what has no head of its own."""
    said = [part["tie_word_embeddings"] for part in _parts(config) if "tie_word_embeddings" in part]
    return any(said) if said else not has_head


def rewrite_config(folder: Path, *, untied: bool, vocabulary: tuple[int, int] | None) -> None:
    """Set in config.json, and in its parts that have them, what a baked model differs in from its base.

    `untied`: embedding and head are two tensors. `vocabulary`: the number of tokens before and after.
    """
    config = read_config(folder)
    for part in _parts(config):
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if vocabulary is not None and part.get("vocab_size") == vocabulary[0]:
            part["vocab_size"] = vocabulary[1]
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
