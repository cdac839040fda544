"""What a model has answered is kept under a fingerprint of all that decides it: asked again, it would say the same.

Apart from the harvest because it is a format of its own: JSON lines, a header and a line a prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SafeMergeError
from ..io.documents import UNREADABLE
from ..io.paths import as_path
from ..io.whole_file import whole_file
from ..live.modules import is_adapters, is_dtensor
from ..live.ranks import everyones, from_first, rank
from ..signals.chat import text_part
from ..signals.responses import end_tokens
from ..subspace.recognise import choose_positions, values_at

VARIABLE = "SAFEMERGE_CACHE"
_FORMAT = "safemerge harvest 1"
# What a config holds besides the model: where it lies, who saved it, how it is run.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "pad_token_id")


def harvest_folder(cache: bool | str | Path = True) -> Path | None:
    """Return where harvests are kept: True is `harvest` in SAFEMERGE_CACHE, else in ~/.cache/safemerge_callback.

    None where there is no such place, which is told, or `cache` is False. ConfigError for a path that can be none.
    """
    if isinstance(cache, bool):
        try:
            root = as_path(os.environ.get(VARIABLE) or "~/.cache/safemerge_callback", f"the cache ({VARIABLE})")
        except SafeMergeError as error:
            warnings.warn(f"safemerge: {error}; nothing is kept", stacklevel=2)
            return None
        return root / "harvest" if cache else None
    return as_path(cache, "cache")


def harvest_key(model: Any, tokenizer: Any, tokens: Sequence[Sequence[int]], max_new_tokens: int) -> str:
    """Return a fingerprint of the model, of the prompts as it reads them, and of how long its answers may be.

    The model is its config and 16 values of each parameter without the adapters' own, whose names are left out, so that
    a wrapper changes nothing. The template and its settings are in the tokens. Collective.
    """
    ends = end_tokens(model, text_part(tokenizer))
    known = [_FORMAT, _model_digest(model), [list(ids) for ids in tokens], max_new_tokens, sorted(ends)]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()


def cached(
    folder: Path | None, key: str, tokens: Sequence[Sequence[int]], answers: Callable[[], list[list[int]]]
) -> tuple[list[list[int]], bool]:
    """Return what is kept under `key`, and True; or what `answers` gives, which is then kept, and False.

    A file that cannot be read, or holds anything else than an answer to each of `tokens`, counts as none. One that
    cannot be written is told, and nothing more. Collective; the first rank alone reads and writes.
    """
    path = None if folder is None else folder / f"{key}.jsonl"
    kept = from_first(_read(path, key, tokens) if path is not None and rank() == 0 else None)
    if kept is not None:
        return kept, True
    said = answers()
    if path is not None and rank() == 0:
        _write(path, key, tokens, said)
    return said, False


def _read(path: Path, key: str, tokens: Sequence[Sequence[int]]) -> list[list[int]] | None:
    try:
        header, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        whole = header == _header(key, len(tokens)) and [line["prompt"] for line in lines] == [*map(list, tokens)]
        said = [line["response"] for line in lines]
    except (OSError, KeyError, TypeError, *UNREADABLE):
        return None
    return said if whole and all(_are_ids(ids) for ids in said) else None


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids)


def _write(path: Path, key: str, tokens: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> None:
    lines = [{"prompt": list(ids), "response": list(new)} for ids, new in zip(tokens, said, strict=True)]
    text = "".join(f"{json.dumps(line)}\n" for line in (_header(key, len(tokens)), *lines))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"safemerge: the harvest cannot be kept in {str(path.parent)!r} ({reason})", stacklevel=2)


def _header(key: str, count: int) -> Mapping[str, Any]:
    return {"format": _FORMAT, "key": key, "prompts": count}


def _model_digest(model: Any) -> str:
    """A digest that all ranks agree on: where each has a part of the parameters, it is of all parts."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_THE_MODEL}
    seen = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        if not is_adapters(name):
            seen.update(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
            seen.update(_sample(parameter))
    parts = everyones(seen.hexdigest())
    return parts[0] if len(set(parts)) == 1 else hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()


def _sample(parameter: Any) -> bytes:
    """Some values, of this rank's part where there is one; none of a tensor that has no values to show."""
    part = getattr(parameter, "ds_tensor", parameter)
    part = part.to_local() if is_dtensor(part) else part
    if part.device.type == "meta" or not part.numel():
        return b""
    try:
        return values_at(part, choose_positions(part, None)).numpy().tobytes()
    except (RuntimeError, TypeError):
        # A packed tensor of some quantizer, which cannot be read by position: its shape must do.
        return b""
