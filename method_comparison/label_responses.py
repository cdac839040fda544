"""How often does the judge of a comparison agree with a reader of the responses?

    python -m method_comparison.label_responses --config GRID --sheet runs/sheet.csv --draw 120
    python -m method_comparison.label_responses --config GRID --sheet runs/sheet.csv

The first call draws responses of the grid's finished cells into a sheet that names neither the arm nor the verdict. The
reader writes refused, complied or incoherent into its last column, and the second call compares, arm by arm. The
sheet holds what a model answers to harmful prompts: keep it to yourself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .grid import cells_of, load_grid
from .labels import LABELS, agreements, read_labels, responses_of, write_sheet
from .markdown import percent, table


def main(args: Sequence[str] | None = None) -> None:
    """Draw a sheet, or print what its labels say; ConfigError where there is nothing to draw or to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the grid, a YAML file in method_comparison/grids")
    parser.add_argument("--sheet", type=Path, required=True, help="CSV file that is drawn, or read when it is labelled")
    parser.add_argument("--draw", type=int, metavar="N", help="write so many responses into a new sheet")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    given = parser.parse_args(args)
    grid = load_grid(given.config)
    responses = responses_of(grid, cells_of(grid))
    if given.draw is not None:
        print(f"{write_sheet(responses, given.draw, given.sheet, given.seed)}: label each row one of {LABELS}")
        return
    found = agreements(responses, read_labels(given.sheet))
    rows = [
        [one.arm, str(one.n), percent(one.agree), f"{100 * one.reader:.1f}", f"{100 * one.judge:.1f}"] for one in found
    ]
    print(table(["arm", "n", "agree, %", "refused by the reader, %", "by the judge, %"], rows))


if __name__ == "__main__":
    main()
