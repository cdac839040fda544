"""Values as JSON has them, for programs that read what a verb prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def plain(value: Any) -> Any:
    """Return a value of JSON's kinds: a path as text, tuples and sets as lists, what is no finite number as null.

    A named tuple becomes an object by its fields' names. TypeError for anything else that JSON has no word for.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
    raise TypeError(f"a {type(value).__name__} is no value of JSON")


def json_text(value: Any) -> str:
    """Return a value as indented JSON, in ASCII; as `plain`."""
    return json.dumps(plain(value), indent=2, allow_nan=False)
