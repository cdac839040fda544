"""Rows of training data: TRL's conversational prompt and completion; rows of a dataset on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def load_rows(
    dataset: str,
    config: str | None,
    split: str,
    revision: str | None = None,
    *,
    otherwise: str = "",
    **files: Any,
) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a split; ConfigError where `datasets` is not installed, or the Hub does not give them.

    `otherwise` ends the sentence: what else would do. `files`: `data_dir` and `data_files`, as `datasets` has them.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"{dataset!r} needs datasets: pip install 'safemerge-callback[recipes]'") from None
    # Whatever the library raises: its errors have no common kind.
    try:
        return load_dataset(dataset, config, split=split, revision=revision, **files)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"split {split!r} of {dataset!r} cannot be had from the Hub ({type(error).__name__}: {reason}): go online "
            f"once{otherwise}"
        ) from error
