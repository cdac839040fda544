"""What was published beside the page: taken as done, or set beside the same cells run again, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safemerge_callback.errors import ConfigError

from .cells import RESULT, write_json
from .grid import Cell, Grid
from .resolve import folder_of
from .results import LINES, Result, result_of, why_other


def elsewhere(grid: Grid, folder: str | Path) -> Grid:
    """Return the grid with its cells and page in `folder`; ConfigError where that is where its own are."""
    if Path(folder).resolve() == Path(grid.output_dir).resolve():
        raise ConfigError(f"{str(folder)!r} holds the grid's own cells: give another folder to repeat them in")
    return replace(grid, output_dir=str(folder), page=str(Path(folder) / "results.md"))


def published_results(grid: Grid) -> dict[str, Result]:
    """Return cell name -> result, of the file beside the grid's page; ConfigError where there is none."""
    path = Path(grid.page).with_suffix("") / LINES
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {result["cell"]: result for result in map(json.loads, lines)}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{str(path)!r} holds no results ({error}): run the grid first") from error


def take_published(
    grid: Grid, cells: Sequence[Cell], published: Mapping[str, Result], stamp: Mapping[str, Any]
) -> list[Cell]:
    """Give each cell that has no result the published one, if there is one without an error; return those cells.

    A clone has these and no cells. ConfigError, before any is taken, for those that are not what a run with `stamp`
    would give now.
    """
    taken = [cell for cell in cells if cell.name in published and result_of(grid, cell) is None]
    taken = [cell for cell in taken if not published[cell.name]["error"]]
    others = {cell.name: why for cell in taken if (why := why_other(grid, cell, published[cell.name], stamp))}
    if others:
        name, why = next(iter(others.items()))
        raise ConfigError(
            f"{len(others)} of {len(taken)} published results are not of this version ({name}: {', '.join(why)}): give "
            "another page and output_dir, and run their cells again; or, for code that --repeat-in shows to give the "
            "same, name both digests under same_code"
        )
    for cell in taken:
        folder_of(grid, cell).mkdir(parents=True, exist_ok=True)
        write_json(folder_of(grid, cell) / RESULT, published[cell.name])
    return taken


def run_since(grid: Grid, cells: Sequence[Cell], published: Mapping[str, Result]) -> list[tuple[Cell, Result]]:
    """Return those published cells, with their results of now, that have been run again since."""
    found = [(cell, result) for cell in cells if cell.name in published and (result := result_of(grid, cell))]
    return [(cell, result) for cell, result in found if result["date"] != published[cell.name]["date"]]


def beside_published(grid: Grid, repeated: Sequence[tuple[Cell, Result]], published: Mapping[str, Result]) -> list[str]:
    """Return a line a cell: how many of its outcomes are those published, and what else differs between the runs."""
    lines = []
    for cell, result in repeated:
        then = published.get(cell.name)
        if result["error"] or then is None or then["error"]:
            lines.append(f"{cell.name}: {result['error'] or 'published without figures'}")
            continue
        # By the grid's own paths: that the folder is another one is no difference.
        why = why_other(grid, cell, then, result["stamp"])
        lines.append("; ".join([f"{cell.name}: {_outcomes(result, then)}", *why]))
    return lines


def _outcomes(result: Result, then: Result) -> str:
    """How many outcomes are equal; what one of both lacks counts as other."""
    now, before = ({m["measure"]: m["outcomes"] for m in one["measures"]} for one in (result, then))
    differing: list[str] = []
    equal = total = 0
    for measure in {**before, **now}:
        x, y = before.get(measure, ""), now.get(measure, "")
        pairs = [a == b for a, b in zip_longest(x, y)]
        equal, total = equal + sum(pairs), total + len(pairs)
        differing += [f"{measure} {pairs.count(False)}"] if x != y else []
    return f"{equal} of {total} outcomes equal" + (f" (other: {', '.join(differing)})" if differing else "")
