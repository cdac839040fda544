"""The values of a line as JSON has them, and ValueError for what is none of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import shown
from ...io.numbers import is_number, is_whole


def number(value: Any) -> float:
    """Return a number; JSON has no NaN, so the journal writes null. ValueError for what no float holds."""
    if value is None or value != value:
        return math.nan
    if not is_number(value):
        raise ValueError(f"{shown(value)} where a number is due")
    return float(value)


def known(value: Any) -> float | None:
    """Return a number, None where it is null; ValueError as `number`."""
    amount = number(value)
    return None if math.isnan(amount) else amount


def count(value: Any) -> int:
    """Return a whole number from 0; ValueError for what is none."""
    amount = number(value)
    if not (amount.is_integer() and is_whole(int(amount), 0)):
        raise ValueError(f"{shown(value)} where a count is due")
    return int(amount)


def module_name(module: Mapping[str, Any]) -> str:
    """Return a module's name; ValueError for one that no file and no terminal takes, as half of a surrogate pair."""
    name = str(module["name"])
    name.encode()
    return name
