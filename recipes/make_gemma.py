"""Make `gemma` and `gemma-aligned`, once the Gemma terms are accepted.

    make study ACCEPT=--accept-gemma-terms
    python -m recipes.make_gemma --accept-gemma-terms      # the wheels being installed

Apart from `gemma`, which the models' names lead to: this trains, and so knows the recipes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from recipes.command import run_command
from recipes.gemma import ALIGNMENT, TERMS, aligned_folder, make_gemma
from recipes.model_cache import merged_checkpoint, written_once
from recipes.train_safety_adapter import main as train
from safemerge_callback.errors import ConfigError


def make_aligned(cache: Path | None = None) -> Path:
    """Train the alignment and merge it, some five minutes of a core, unless it is there; return its folder."""

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory() as adapter:
            train(["--config", str(ALIGNMENT), "--model_name_or_path", str(make_gemma(cache)), "--output_dir", adapter])
            merged_checkpoint(make_gemma(cache), Path(adapter), target)

    return written_once(aligned_folder(cache), make)


def main(args: Sequence[str] | None = None) -> None:
    """Make both models, once the terms are accepted."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--accept-gemma-terms", action="store_true", help=f"you have read and accept {TERMS}")
    if not words.parse_args(args).accept_gemma_terms:
        raise ConfigError(
            f"Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS}: read them, and give "
            "--accept-gemma-terms if you accept them (make study ACCEPT=--accept-gemma-terms)"
        )
    print(f"gemma: {make_gemma()}\ngemma-aligned: {make_aligned()}")


if __name__ == "__main__":
    run_command(main)
