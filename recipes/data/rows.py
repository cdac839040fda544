"""One row of training data: TRL's conversational prompt and completion."""

from __future__ import annotations

from typing import Any

from safemerge_callback.errors import ConfigError, nearest


def conversation(prompt: str, completion: str) -> dict[str, Any]:
    """Return a prompt and its completion in TRL's conversational format."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def check_split(data: str, split: str, allowed: tuple[str, ...] = ("train", "test")) -> None:
    """Raise ConfigError for a split that the data does not have."""
    if split not in allowed:
        choice = " or ".join(filter(None, (", ".join(allowed[:-1]), allowed[-1])))
        raise ConfigError(f"split {split!r} of data {data!r} does not exist: choose {choice}{nearest(split, allowed)}")
