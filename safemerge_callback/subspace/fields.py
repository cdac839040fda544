"""What each field of a subspace file's header may hold; apart from the header, whose one reader asks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import shown
from ..io.numbers import is_number, is_whole

_KINDS = ("dense", "factor", "int8", "truncated")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int8")
# Shares and cosines are computed: a last bit may lie above 1.
_ROUNDING = 1e-3


class Rule(NamedTuple):
    """Which values are allowed: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _each(rule: Rule, keys: str = "names", key_holds: Callable[[str], bool] = bool) -> Rule:
    """A mapping from `keys`, texts that `key_holds` says are allowed, to what `rule` allows."""
    return Rule(
        f"a mapping from {keys} to {rule.words}",
        lambda value: isinstance(value, dict) and all(key_holds(k) and rule.holds(v) for k, v in value.items()),
    )


def _is_rank(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


_TEXT = Rule("texts", lambda value: isinstance(value, str))
_MAPPING = Rule("mappings", lambda value: isinstance(value, dict))
_SIZE = Rule("numbers of 0 or more", lambda value: is_number(value) and value >= 0)
_SHARE = Rule("numbers from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1 + _ROUNDING)
_NAMES = Rule("lists of names", lambda value: isinstance(value, list) and all(map(_TEXT.holds, value)))

MODULE_FIELDS: Mapping[str, Rule] = {
    "shape": Rule(
        "two whole numbers of 1 or more",
        lambda value: isinstance(value, list) and len(value) == 2 and all(is_whole(size, 1) for size in value),
    ),
    "kind": Rule(f"one of {_KINDS}", lambda value: isinstance(value, str) and value in _KINDS),
    "rank": Rule("null or whole numbers of 1 or more", lambda value: value is None or is_whole(value, 1)),
    "dtype": Rule(f"one of {_DTYPES}", lambda value: isinstance(value, str) and value in _DTYPES),
    "norm": Rule("numbers above 0", lambda value: is_number(value) and value > 0),
    "null_cosine": _SHARE,
    "null_std": _each(_SIZE, "ranks", _is_rank),
    "energy": _each(_SHARE, "ranks", _is_rank),
    "error": _SIZE,
    "checksums": _each(_TEXT),
    "cross": _SIZE,
}
FILE_FIELDS: Mapping[str, Rule] = {
    "aligned": _MAPPING,
    "unaligned": _MAPPING,
    "modules": _each(_MAPPING),
    "unmoved": _NAMES,
    "probed": _NAMES,
    "exact": Rule(
        "an empty mapping or one with `file` and `sha256`",
        lambda value: _each(_TEXT).holds(value) and (not value or {"file", "sha256"} <= value.keys()),
    ),
    "checksums": _each(_TEXT),
}


def check_fields(values: Any, rules: Mapping[str, Rule], who: str) -> None:
    """Raise ValueError for a field of `values` whose rule does not hold; `who` says whose fields they are.

    A field that is not there is for the reader to miss.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{who} is {shown(values)}, not a mapping")
    for name, rule in rules.items():
        if name in values and not rule.holds(values[name]):
            raise ValueError(f"{name} of {who} is {shown(values[name])}; allowed are {rule.words}")
