"""A user's regular expression, compiled: whatever is given, a pattern or one sentence."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError, SafeMergeError, shown


def as_pattern(
    text: Any, what: str, *, within: tuple[str, str] = ("", ""), error: type[SafeMergeError] = ConfigError
) -> re.Pattern[str]:
    """Return `text` as a compiled pattern, between the two texts of `within`.

    `error`, which begins with `what`, for what is no text or no regular expression, one nested too deep or with counts
    too large among them.
    """
    if not isinstance(text, str):
        raise error(f"{what} {shown(text)} is no regular expression: give one, as text")
    try:
        return re.compile(text.join(within))
    except (re.error, OverflowError, RecursionError) as problem:
        raise error(f"{what} {shown(text)} is no regular expression ({problem}): write one") from problem
