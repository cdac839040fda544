"""Cells run again elsewhere, beside what was published: which of their outcomes are the same, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from safemerge_callback.errors import ConfigError

from .grid import Cell, Grid
from .results import LINES, Result, why_other


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
