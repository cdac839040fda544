"""Does what the callback measures tell which runs lost their refusals? The adapters of a grid, measured afterwards.

    python -m recipes.drift --config configs/compare/smollm2.yaml

Reads the adapters and results that `recipes.compare` left in the grid's output_dir, and writes drift.md, drift.csv and
drift.svg beside the grid's page. Nothing is trained or asked again. `--take-published` keeps the runs that drift.csv
holds, and measures the others: adapters are not published. So a clone writes the page anew, and in it the edge of
`moved` below which refusals were lost, which the callback warns by.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes.comparison.drift import drifts, published_drifts, write_drift
from recipes.comparison.grid import cells_of, load_grid
from safemerge_callback.errors import ConfigError


def main(args: Sequence[str] | None = None) -> None:
    """Measure and write; ConfigError where the grid has no adapter with a result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the grid, a YAML file in configs/compare")
    parser.add_argument("--since", default="", metavar="TIME", help="also set apart the runs since then")
    parser.add_argument("--take-published", action="store_true", help="keep the runs that drift.csv holds as they are")
    given = parser.parse_args(args)
    grid = load_grid(given.config)
    published = published_drifts(grid) if given.take_published else {}
    found = drifts(grid, cells_of(grid), published) if published or grid.subspace.is_file() else []
    if not found:
        raise ConfigError(f"{grid.output_dir!r} holds no adapter with a result: run `python -m recipes.compare` first")
    print(f"{len(found)} adapters; page: {write_drift(grid, given.config, found, given.since)}")


if __name__ == "__main__":
    main()
