"""YAML and JSON as this package reads them: a key that is given twice is refused, where the libraries keep the last."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError


def read_yaml(path: str | Path, who: str) -> Any:
    """Return what a YAML file holds, and raise as `parse_yaml`; `who` names the file in the error."""
    return parse_yaml(Path(path).read_text(encoding="utf-8"), who)


def parse_yaml(text: str, who: str) -> Any:
    """Return what a YAML text holds; ConfigError, which begins with `who`, for a mapping with a key given twice."""
    loader = _Loader(text)
    loader.who = who
    return loader.get_single_data()


def read_json(path: str | Path, who: str) -> Any:
    """Return what a JSON file holds, and raise as `parse_json`; `who` names the file in the error."""
    return parse_json(Path(path).read_text(encoding="utf-8"), who)


def parse_json(text: str, who: str) -> Any:
    """Return what a JSON text holds; ConfigError, which begins with `who`, for an object with a key given twice."""

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f"{who} gives the key {key!r} twice: keep one of the two")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=once)


class _Loader(yaml.SafeLoader):
    """The safe loader (plain values, nothing is run), which looks at the keys as written, before `<<` brings others."""

    who = "the YAML"

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Hashable, int] = {}
        for written, _ in node.value:
            # Several `<<` are all taken in; a key that is no scalar is refused by yaml itself.
            if written.id == "scalar" and written.tag != "tag:yaml.org,2002:merge":
                key, line = self.construct_object(written), written.start_mark.line + 1
                if key in lines:
                    where = f"in lines {lines[key]} and {line}"
                    raise ConfigError(f"{self.who} gives the key {key!r} twice, {where}: keep one of the two")
                lines[key] = line
        return node
