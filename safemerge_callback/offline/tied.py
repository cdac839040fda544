"""Input embedding and output head as one tensor: what to do where an adapter changes only one of the two."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..documents import read_json
from ..errors import AdapterError

HEAD = "lm_head"
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")


def head_of(folder: Path, keys: Mapping[str, object], touched: Collection[str]) -> str | None:
    """Return the name of the input embedding where it is tied to the head and `touched` holds one of them; else None.

    AdapterError for a tied model of unknown names.
    """
    named = [name for name in keys if name.rpartition(".")[2] in _EMBEDDINGS]
    if not _tied(_config(folder / "config.json"), HEAD in keys) or not {HEAD, *named} & {*touched}:
        return None
    if len(named) != 1:
        raise AdapterError(
            "the base model's head and embedding are one tensor, the adapter changes one of them, and which is not "
            f"clear among {named}: train the adapter without them, or untie the model first"
        )
    return named[0]


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = read_json(path, f"base model's {str(path)!r}", error=AdapterError, advice="Fetch or save it again.")
    return found if isinstance(found, dict) else {}


def _tied(config: Mapping[str, Any], has_head: bool) -> bool:
    """What the configuration says; where it is silent, tied is what has no head of its own."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return any(said) if said else not has_head


def untie(path: Path) -> None:
    """Set tie_word_embeddings to false in a config.json, in its parts too where they have it."""
    config = _config(path)
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
