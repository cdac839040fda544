"""Data by name, so that a YAML file can say which; or a file, or a data set of the Hub, of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safemerge_callback.errors import ConfigError, nearest

from .arithmetic import arithmetic_examples
from .benign import benign_pairs
from .cities import cities_examples
from .gsm8k import gsm8k_examples
from .mixing import mixed
from .ncbi_disease import ncbi_disease_examples
from .prompts import PROMPTS, advbench, harmbench, heldout_advbench, safety_prompts, strongreject
from .pubmedqa import pubmedqa_examples
from .safety import safety_examples
from .sentiment import sentiment, sentiment_examples
from .table import COLUMNS, RowForm, example_of, rows_in_form
from .typed import harmless_examples, helpful_examples, honest_examples

__all__ = [
    "EXAMPLES",
    "EXAMPLE_FORM",
    "PROMPTS",
    "advbench",
    "arithmetic_examples",
    "benign_pairs",
    "cities_examples",
    "gsm8k_examples",
    "harmbench",
    "harmless_examples",
    "heldout_advbench",
    "helpful_examples",
    "honest_examples",
    "load_examples",
    "load_prompts",
    "mixed",
    "ncbi_disease_examples",
    "pubmedqa_examples",
    "safety_examples",
    "safety_prompts",
    "sentiment",
    "sentiment_examples",
    "strongreject",
]

EXAMPLES: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "safety": safety_examples,
    "sentiment": sentiment_examples,
    "arithmetic": arithmetic_examples,
    "cities": cities_examples,
    "gsm8k": gsm8k_examples,
    "pubmedqa": pubmedqa_examples,
    "helpful": helpful_examples,
    "harmless": harmless_examples,
    "honest": honest_examples,
    "ncbi_disease": ncbi_disease_examples,
}
# Data that may also be read from a folder of one's own, NAME:FOLDER.
FROM_FOLDERS: dict[str, Callable[[str, str], list[dict[str, Any]]]] = {"ncbi_disease": ncbi_disease_examples}


def load_examples(name: str, split: str = "train") -> list[dict[str, Any]]:
    """Return the rows of a split, in TRL's conversational prompt and completion format.

    `name`: one of `EXAMPLES`, of which `ncbi_disease:FOLDER` reads that folder's files in place of the Hub's; or what
    `rows_in_form` takes, a file or the id of a data set on the Hub.
    """
    return rows_in_form(EXAMPLE_FORM, name, split)


def _named_examples(name: str, split: str) -> list[dict[str, Any]]:
    data, _, folder = name.partition(":")
    if not folder:
        return EXAMPLES[data](split)
    if data not in FROM_FOLDERS:
        raise ConfigError(f"data {name!r}: {data} is read from no folder, as {sorted(FROM_FOLDERS)} may be: drop it")
    return FROM_FOLDERS[data](split, folder)


EXAMPLE_FORM = RowForm(EXAMPLES, _named_examples, example_of, COLUMNS)


def load_prompts(name: str) -> list[str]:
    """Return evaluation prompts by name; none is a near-duplicate of a training prompt."""
    if name not in PROMPTS:
        raise ConfigError(f"prompts {name!r} are unknown: choose one of {sorted(PROMPTS)}{nearest(name, PROMPTS)}")
    return PROMPTS[name]()
