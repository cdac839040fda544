"""Settings in a YAML file, which may be those of another file but for some: how recipes and grids read theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_callback.errors import ConfigError
from safemerge_callback.io.documents import read_yaml


def read_settings(path: str | Path, kind: str, advice: str = "") -> dict[str, Any]:
    """Return the settings of a YAML file, which messages call a `kind` and its path.

    `base: FILE`, a path from the file's own folder, takes in another file, which has no base itself: what is said here
    goes before what is said there, in mappings key by key. ConfigError for what is no file of settings, or no base,
    which ends with `advice` where a file cannot be read.
    """
    raw = _read(Path(path), kind, advice)
    if (base := raw.pop("base", None)) is None:
        return raw
    if not isinstance(base, str) or "base" in (under := _read(Path(path).parent / base, kind, advice)):
        advice_on_base = f"name a {kind} that has none itself, by its path from this one's folder"
        raise ConfigError(f"base of {kind} {str(path)!r} is {base!r}: {advice_on_base}")
    return {**under, **{key: _over(under.get(key), value) for key, value in raw.items()}}


def _read(path: Path, kind: str, advice: str) -> dict[str, Any]:
    raw = read_yaml(path, f"{kind} {str(path)!r}", advice=advice)
    if not isinstance(raw, dict):
        raise ConfigError(f"{kind} {str(path)!r} holds {type(raw).__name__}: it must map settings to values")
    return raw


def _over(under: Any, value: Any) -> Any:
    both = isinstance(under, Mapping) and isinstance(value, Mapping)
    return {**under, **value} if both else value
