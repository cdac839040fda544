"""Results on disk: which count, which are another version's, which are published, and the files that hold them all."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safemerge_callback.errors import ConfigError

from .cells import MARK, RESULT, write_json
from .grid import Grid, GridCell, parent_of
from .resolve import folder_of, resolved
from .stamp import differences, digest, settings_digest

Result = dict[str, Any]
LINES, TABLE, ASIDE = "results.jsonl", "results.csv", "others"
_COLUMNS = ("arm", "family", "kind", "task", "poisoned_share", "seed", "split")
_MEASURE = ("measure", "n", "value", "low", "high")
_SHOWN = 5


def result_of(grid: Grid, cell: GridCell) -> Result | None:
    """Return the cell's result, if it has one; ConfigError where the file is no result."""
    path = folder_of(grid, cell) / RESULT
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is no result ({error}): delete it, and the cell runs again") from error
    return dict(result)


def why_other(grid: Grid, cell: GridCell, result: Result, stamp: Mapping[str, Any]) -> list[str]:
    """Return in words why a result is not what this cell would give now; nothing where it is."""
    why = differences(result["stamp"], stamp, grid.same_code)
    if result["split"] != grid.split:
        why.append(f"split {result['split']} and not {grid.split}")
    if result["settings"] != settings_digest(resolved(grid, cell), grid.evaluate):
        why.append("other settings of the arm or of the evaluation")
    return why


def sort_out(grid: Grid, cells: Sequence[GridCell], stamp: Mapping[str, Any], keep_others: bool) -> list[GridCell]:
    """Return the cells that have yet to run: those without a result, and those whose last try failed.

    Results of another version, code, data, device or setting are refused with what differs; with `keep_others` they
    are set apart, in `others/`, and their cells run again.
    """
    results = {cell: result for cell in cells if (result := result_of(grid, cell)) is not None}
    others = {cell: why for cell, result in results.items() if (why := why_other(grid, cell, result, stamp))}
    if others and not keep_others:
        listed = "; ".join(f"{cell.name}: {', '.join(why)}" for cell, why in list(others.items())[:_SHOWN])
        raise ConfigError(
            f"{len(others)} results in {grid.output_dir!r} are not of this version: {listed}. Give another output_dir, "
            "or --keep-others, which sets them apart and runs their cells again"
        )
    for cell, why in others.items():
        _set_apart(grid, cell, why)
    return [cell for cell in cells if cell in others or cell not in results or results[cell]["error"]]


def with_parents(grid: Grid, cells: Sequence[GridCell]) -> list[GridCell]:
    """Return the cells and, before them, those whose adapter they merge and which are done but have none left.

    An adapter may be gone, deleted or of another machine, while its result stays: what merges it needs it again.
    """
    parents = [parent for cell in cells if (parent := parent_of(grid, cell)) is not None]
    gone = [parent for parent in parents if not (folder_of(grid, parent) / MARK).is_file()]
    return list(dict.fromkeys([*gone, *cells]))


def one_version(
    results: Sequence[Result], keep_others: bool, same_code: Sequence[str] = ()
) -> tuple[list[Result], list[Result]]:
    """Return the results with the newest one's stamp, and the others; ConfigError for others without `keep_others`."""
    if not results:
        return [], []
    newest = max(results, key=lambda result: str(result["date"]))["stamp"]
    why = [differences(result["stamp"], newest, same_code) for result in results]
    others = [{**result, "other": words} for result, words in zip(results, why, strict=True) if words]
    if others and not keep_others:
        raise ConfigError(
            f"{len(others)} of {len(results)} results are of another version than the newest ({others[0]['cell']}: "
            f"{', '.join(others[0]['other'])}): run their cells again, or give --keep-others, which lists them apart"
        )
    return [result for result, words in zip(results, why, strict=True) if not words], others


def _set_apart(grid: Grid, cell: GridCell, why: Sequence[str]) -> None:
    folder = folder_of(grid, cell)
    result = {**json.loads((folder / RESULT).read_text(encoding="utf-8")), "other": list(why)}
    name = digest([json.dumps(result, sort_keys=True).encode()])
    aside = Path(grid.output_dir) / ASIDE / cell.name / name
    aside.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    write_json(aside / RESULT, result)


def others_of(grid: Grid) -> list[Result]:
    """Return the results that were set apart."""
    paths = sorted((Path(grid.output_dir) / ASIDE).rglob(RESULT))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def write_results(grid: Grid, cells: Sequence[GridCell], folder: str | Path | None = None) -> list[Result]:
    """Write all results of the cells to results.jsonl and results.csv in `folder` (None: the grid's); return them."""
    results = [result for cell in cells if (result := result_of(grid, cell)) is not None]
    folder = Path(folder or grid.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(result) + "\n" for result in results)
    (folder / LINES).write_text(lines, encoding="utf-8")
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*_COLUMNS, *_MEASURE, "make_seconds", "evaluate_seconds", "commit", "date", "error"])
        for result in results:
            table.writerows(_rows(result))
    return results


def _rows(result: Result) -> list[list[Any]]:
    about = [result[name] for name in _COLUMNS]
    spent = [result["seconds"].get(name) for name in ("make", "evaluate")]
    rest = [*spent, result["stamp"]["commit"], result["date"], result["error"]]
    measures: list[dict[str, Any]] = result["measures"] or [{}]
    return [[*about, *(measure.get(name) for name in _MEASURE), *rest] for measure in measures]


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
    grid: Grid, cells: Sequence[GridCell], published: Mapping[str, Result], stamp: Mapping[str, Any]
) -> list[GridCell]:
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


def run_since(grid: Grid, cells: Sequence[GridCell], published: Mapping[str, Result]) -> list[tuple[GridCell, Result]]:
    """Return those published cells, with their results of now, that have been run again since."""
    repeated = [(cell, result) for cell in cells if cell.name in published and (result := result_of(grid, cell))]
    return [(cell, result) for cell, result in repeated if result["date"] != published[cell.name]["date"]]


def beside_published(
    grid: Grid, repeated: Sequence[tuple[GridCell, Result]], published: Mapping[str, Result]
) -> list[str]:
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
