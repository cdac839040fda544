"""Apart, to be dropped with the old files: what a journal of version 1 does not say, worked out from what it does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..history import History
from .values import number


def limit_of_version_1(history: History, module: Mapping[str, Any]) -> float:
    """Return what `limit` would say of a module of a check that lacks it; NaN for a gate that has none.

    These are the gates of version 1, as they were then. No gate that comes is added here: its lines say it themselves.
    """
    if history.gate == "threshold":
        return history.threshold
    if history.gate == "calibrated":
        return number(module["null_cosine"]) + number(history.knob) * number(module.get("null_std"))
    if history.gate == "reference":
        return number(history.knob) * number(module.get("reference"))
    return math.nan
