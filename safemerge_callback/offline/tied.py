"""What a configuration says of the vocabulary: are embedding and head one tensor, and how many tokens there are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..adapters.names import EMBEDDINGS
from ..errors import AdapterError
from ..io.documents import read_json

HEAD = "lm_head"
CONFIG = "config.json"


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
    found = read_json(path, f"base model's {str(path)!r}", error=AdapterError, advice="Fetch or save it again.")
    return found if isinstance(found, dict) else {}


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
