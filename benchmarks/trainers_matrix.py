"""Run the callback in every trainer and setup, and write what came of it into docs/trainers.md.

python -m benchmarks.trainers_matrix [--only WORD] [--page FILE]

Each cell trains a tiny model for three steps on the CPU, with the callback merging every module after every step
(weights 0.8 and 0.2), and checks from outside: every decision is in the journal; nothing but the trained adapter's
factors changed; each merged update is the dense formula's; the saved adapter gives the same logits in plain PEFT.
`--only` runs the cells whose group or name holds WORD, and writes no page unless one is given. Ends with status 1 where
a trainer that runs alone fails with the callback.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from benchmarks.trainers.adapters import ADAPTERS
from benchmarks.trainers.cell import CellOutcome, TrainerCell, run
from benchmarks.trainers.engines import ENGINES
from benchmarks.trainers.page import write_page
from benchmarks.trainers.trainers import EXPERIMENTAL, TRANSFORMERS, TRL
from benchmarks.trainers.world import Base, make_base

CELLS = [*TRANSFORMERS, *TRL, *EXPERIMENTAL, *ADAPTERS, *ENGINES]
PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"


def run_all(cells: Sequence[TrainerCell], folder: Path) -> list[CellOutcome]:
    """Run the cells one after another, each in a folder of its own; print a line each."""
    bases: dict[str, Base] = {}
    outcomes = []
    for number, cell in enumerate(cells):
        if cell.family not in bases:
            bases[cell.family] = make_base(folder / cell.family, cell.family)
        outcome = run(cell, bases[cell.family], folder / f"run{number}")
        outcomes.append(outcome)
        print(f"{outcome.status:12} {cell.name:55} {outcome.seconds:5.1f} s  {outcome.why[:200]}", flush=True)
    return outcomes


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cells whose group or name holds this")
    parser.add_argument("--page", type=Path, help="the page to write; docs/trainers.md for a run of all cells")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [cell for cell in CELLS if options.only.lower() in f"{cell.group}: {cell.name}".lower()]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_all(chosen, Path(folder))
    page = options.page or (None if options.only else PAGE)
    if page:
        write_page(page, outcomes)
    sys.exit(any(outcome.status == "FAILS" for outcome in outcomes))


if __name__ == "__main__":
    main()
