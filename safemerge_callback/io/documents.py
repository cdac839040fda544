"""YAML and JSON as this package reads them: plain values or one sentence, whatever the file holds.

A key that is given twice is refused, where the libraries keep the last.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, SafeMergeError
from .file_faults import reading_fault
from .numbers import is_number
from .paths import as_path

# What parsing may raise besides yaml's errors: no UTF-8, no JSON, digits or dates past what Python takes; too deep.
UNREADABLE = (ValueError, RecursionError)
# Bytes of a file that is read whole: the index of the largest checkpoints has a tenth; YAML is read slowly.
_LARGEST, _LARGEST_YAML = 256 << 20, 4 << 20
# Values that a YAML text may mean once its anchors are written out.
_MOST_VALUES = 1_000_000


def read_text(path: Any, who: str, *, error: type[SafeMergeError] = ConfigError, advice: str = "") -> str:
    """Return what a text file holds; `error` as `read_yaml` for one that cannot be read, or is no UTF-8."""
    with _refusing(who, error, advice):
        return _content(path, who, error)


def read_yaml(path: Any, who: str, *, error: type[SafeMergeError] = ConfigError, advice: str = "") -> Any:
    """Return what a YAML file holds.

    `error`, which begins with `who` (it names the file) and ends with `advice`, for what is no readable regular file,
    no YAML, or holds a key twice, itself, a value past a float's range, or more than a million values.
    """
    with _refusing(who, error, advice):
        return _yaml(_content(path, who, error, _LARGEST_YAML), who, error)


def parse_yaml(text: str, who: str, *, error: type[SafeMergeError] = ConfigError, advice: str = "") -> Any:
    """Return what a YAML text holds, and raise as `read_yaml`."""
    with _refusing(who, error, advice):
        return _yaml(text, who, error)


def read_json(path: Any, who: str, *, error: type[SafeMergeError] = ConfigError, advice: str = "") -> Any:
    """Return what a JSON file holds; `error` as `read_yaml` for what cannot be read, or an object with a key twice."""
    with _refusing(who, error, advice):
        return _json(_content(path, who, error, _LARGEST), who, error)


def parse_json(text: str | bytes, who: str, *, error: type[SafeMergeError] = ConfigError, advice: str = "") -> Any:
    """Return what a JSON text holds, and raise as `read_json`."""
    with _refusing(who, error, advice):
        return _json(text, who, error)


@contextmanager
def _refusing(who: str, kind: type[SafeMergeError], advice: str) -> Iterator[None]:
    then = f". {advice}" if advice else ""
    try:
        yield
    except SafeMergeError:
        raise
    except RecursionError as error:
        raise kind(f"{who} cannot be read: it is nested too deep{then}") from error
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        form = "YAML" if isinstance(error, yaml.YAMLError) else "JSON"
        raise kind(f"{who} is no {form}: {' '.join(str(error).split())}{then}") from error
    except OSError as error:
        raise kind(f"{who} {reading_fault(Path(), error, advice)}") from error
    except UNREADABLE as error:
        raise kind(f"{who} cannot be read: {' '.join(str(error).split())}{then}") from error


def _content(path: Any, who: str, error: type[SafeMergeError], largest: int = _LARGEST) -> str:
    """The text of a regular file: a pipe or a device may never end."""
    place = as_path(path, who, error=error)
    status = place.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
    if status.st_size > largest:
        raise ValueError(f"it has {status.st_size:,} bytes, more than the {largest:,} that are read")
    # Line ends as they are: a CSV may have some within a field. Spreadsheets and editors write a mark in front, which
    # would become part of the first column's name, and is no JSON.
    return place.read_bytes().decode("utf-8-sig")


def _json(text: str | bytes, who: str, error: type[SafeMergeError]) -> Any:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            key = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
            raise error(f"{who} gives the key {key!r} twice: keep one of the two")
        return mapping

    return json.loads(text, object_pairs_hook=once)


def _yaml(text: str, who: str, error: type[SafeMergeError]) -> Any:
    loader = _Loader(text)
    loader.who, loader.error = who, error
    node = loader.get_single_node()
    if node is None:
        return None
    _values(node, {})
    return loader.construct_document(node)


def _values(node: yaml.Node, counted: dict[yaml.Node, int | None]) -> int:
    """How many values `node` means with its anchors written out; ValueError for more than a text can mean to say."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node not in counted:
        counted[node] = None
        inside = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        counted[node] = 1 + sum(_values(one, counted) for one in inside)
    count = counted[node]
    if count is None:
        raise ValueError("an anchor in it holds itself")
    if count > _MOST_VALUES:
        raise ValueError(f"it means more than {_MOST_VALUES:,} values")
    return count


class _Loader(yaml.SafeLoader):
    """The safe loader (plain values, nothing is run), which looks at the keys as written, before `<<` brings others."""

    who = "the YAML"
    error: type[SafeMergeError] = ConfigError

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Hashable, int] = {}
        for written, _ in node.value:
            # Several `<<` are all taken in; a key that is no scalar is refused by yaml itself.
            if written.id == "scalar" and written.tag != "tag:yaml.org,2002:merge":
                key, line = self.construct_object(written), written.start_mark.line + 1
                if key in lines:
                    where = f"in lines {lines[key]} and {line}"
                    raise self.error(f"{self.who} gives the key {key!r} twice, {where}: keep one of the two")
                lines[key] = line
        return node

    def whole_number(self, node: yaml.ScalarNode) -> Any:
        """An integer that a float can hold: of a longer one, not even a message could be written."""
        number = int(self.construct_yaml_int(node))
        if not is_number(number):
            raise ValueError("a number in it is past what a float can hold")
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
