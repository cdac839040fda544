"""docs/results.md: the grid's questions answered, what was run, figures and differences with intervals, fronts.

Apart from `compare`, which runs the grid: the page can be made of published results alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.data.splits import SETS

from .figures import HARM, SHOWN, Place, matched, places_of, reference_arms, reference_of
from .grid import Grid, cells_of
from .markdown import percent, points, table
from .plots import write_plots
from .results import Result
from .statistics import AtScore

TITLES = {
    HARM: "harm refused",
    "harmbench_refused": "HarmBench",
    "strongreject_refused": "StrongREJECT",
    "advbench_refused": "AdvBench",
    "benign_refused": "harmless refused",
    "task": "task",
    "coherent": "coherent",
}
_COMPARED = (HARM, "benign_refused", "task")
_MEASURES = {HARM: "harm refused", "benign_refused": "harmless refused", "task": "task"}


def write_page(grid: Grid, config: str | Path, results: Sequence[Result], others: Sequence[Result] = ()) -> Path:
    """Write the page and its plots, beside it in a folder of its name; return the page's path."""
    page = Path(grid.page)
    places = places_of(grid, results)
    plots = write_plots(grid, places, page.with_suffix("")) if places else {}
    parts = [
        _head(grid, config, results),
        answers(grid, places),
        *(f"## {title}\n\n![{title}]({path.relative_to(page.parent).as_posix()})" for title, path in plots.items()),
        *(part for place in places for part in _place(grid, place)),
        _arms(grid),
        _failures(results),
        _others(others),
        _notes(grid, config),
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return page


# What of the stamps the page's head tells besides versions.
STAMP_KEYS = ("device", "host", "commit", "code")


def _head(grid: Grid, config: str | Path, results: Sequence[Result]) -> str:
    every, failed = len(cells_of(grid)), sum(bool(result["error"]) for result in results)
    hours = sum(sum(result["seconds"].values()) for result in results) / 3600
    dates = sorted(result["date"][:10] for result in results)
    stamps = [result["stamp"] for result in results]
    versions = {f"{name} {number}": None for stamp in stamps for name, number in stamp["versions"].items()}
    lines = [
        "# Results",
        f"Written by `python -m method_comparison.compare --config {config}`; edit the configuration, not this page.",
        "",
        f"- cells: {len(results) - failed} of {every} done, {failed} failed; split: {grid.split}",
        f"- seeds: {_several(sorted(result['seed'] for result in results))}; hours spent: {hours:.1f}",
        f"- dates: {dates[0]} to {dates[-1]}" if dates else "- dates: none, nothing was run",
        *(f"- {key}: {_several((stamp[key] for stamp in stamps), '; ')}" for key in STAMP_KEYS),
        *([f"- taken as one code: {', '.join(grid.same_code)}"] if grid.same_code else []),
        f"- versions: {', '.join(versions)}",
    ]
    return "\n".join(lines)


def _several(values: Iterable[Any], between: str = ", ") -> str:
    return between.join(dict.fromkeys(map(str, values)))


def answers(grid: Grid, places: Sequence[Place]) -> str:
    """Return the section that comes first: a column a place, in points with 95 % intervals; nothing for no results."""
    parts = [part for part in (_against_fronts(grid, places), _contrasts(grid, places)) if part]
    return "\n\n".join(["## In short", *parts]) if parts else ""


def _against_fronts(grid: Grid, places: Sequence[Place]) -> str:
    """The reference's refusal less that of each family's front at the reference's own task score."""
    scores = [matched(grid, place) for place in places]
    families = dict.fromkeys(family for one in scores for family in one)
    rows = [[family, *(_cell(one.get(family)) for one in scores)] for family in families]
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return ""
    said = (
        f"Harm that {grid.reference} refuses above the front of each other arm (with {grid.baseline} on it), at "
        f"{grid.reference}'s own task score; empty where that front holds no such score:"
    )
    return f"{said}\n\n{table(['front of', *(place.title for place in places)], rows)}"


def _cell(score: AtScore | None) -> str:
    return f"{points(score.above)}, {_seeds(len(score.seeds))}" if score and score.above else ""


def _contrasts(grid: Grid, places: Sequence[Place]) -> str:
    """One arm less another, paired by seed and prompt."""
    rows = []
    for arm, other in grid.contrasts:
        for measure, title in _MEASURES.items():
            shown = [points(place.difference(arm, other, measure)) for place in places]
            rows += [[f"{arm} less {other}", title, *shown]] if any(shown) else []
    if not rows:
        return ""
    heads = ["arms", "measure", *(place.title for place in places)]
    return f"One arm less another, paired by seed and prompt:\n\n{table(heads, rows)}"


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number > 1)}"


def _place(grid: Grid, place: Place) -> list[str]:
    return [f"## {place.title}", _figures(grid, place), _differences(grid, place), _matched(grid, place)]


def _figures(grid: Grid, place: Place) -> str:
    """Every arm with every measure: a mean over seeds and its 95 % interval."""
    rows = []
    for name in (name for name in grid.arms if name in place.arms):
        seeds = len(place.seeds(name))
        shown = [percent(place.interval(name, measure)) for measure in SHOWN]
        rows.append([name, str(seeds), *shown, _merged(place.trails.get(name, []))])
    return table(["arm", "seeds", *TITLES.values(), "merged"], rows)


def _merged(trails: Sequence[dict[str, Any]]) -> str:
    """Mean over seeds of merge events, and of the modules that they touched."""
    if not trails:
        return ""
    merges = sum(trail["merges"] for trail in trails) / len(trails)
    modules = sum(len(trail["merged"]) for trail in trails) / len(trails)
    return f"{modules:.3g} of {trails[0]['modules']}, {merges:.3g} ×"


def _differences(grid: Grid, place: Place) -> str:
    """Every arm less the reference, and its refusal less the reference's front, in points."""
    reference = reference_of(grid, place)
    if reference is None:
        return ""
    front = reference_arms(grid, place)
    rows = [
        [
            name,
            *(points(place.difference(name, reference, measure)) for measure in _COMPARED),
            "" if name in front or grid.arms[name].kind == "model" else _above(place.at_score(name, front)),
        ]
        for name in grid.arms
        if name in place.arms and name != reference and place.difference(name, reference, HARM)
    ]
    if not rows:
        return ""
    heads = ["arm", *(TITLES[measure] for measure in _COMPARED), "harm refused above the front"]
    said = (
        f"Less {reference}, paired by seed and prompt, in points; and, at each arm's own task score, less what the "
        f"front of {', '.join(front)} refuses there:"
    )
    return f"{said}\n\n{table(heads, rows)}"


def _above(score: AtScore | None) -> str:
    return points(score.above) if score else ""


def _matched(grid: Grid, place: Place) -> str:
    """The reference beside every family's front, where both score alike."""
    rows = [
        [
            family,
            str(len(one.seeds)),
            f"{100 * one.task:.1f}",
            f"{100 * one.refusal:.1f}",
            # A front that ends at a higher score than asked might refuse more there: nobody knows.
            f"{100 * one.front:.1f}{' or more' * (one.above is None)}",
            points(one.above),
        ]
        for family, one in matched(grid, place).items()
    ]
    if not rows:
        return ""
    reference = reference_of(grid, place)
    said = (
        f"Harm refused by {reference} and by each front (with {grid.baseline} on it) at {reference}'s own task score, "
        "interpolated, over the seeds that all of them have:"
    )
    heads = ["front of", "seeds", "task", f"{reference}, %", "front, %", f"{reference} above it, points"]
    return f"{said}\n\n{table(heads, rows)}"


def _arms(grid: Grid) -> str:
    rows = [[name, arm.kind, arm.parent or "", arm.about] for name, arm in grid.arms.items()]
    return "## Arms\n\n" + table(["arm", "kind", "merges", "what it is"], rows)


def _failures(results: Sequence[Result]) -> str:
    failed = [[result["cell"], str(result["error"]).splitlines()[0]] for result in results if result["error"]]
    return "## Cells that failed\n\n" + table(["cell", "error"], failed) if failed else ""


def _others(others: Sequence[Result]) -> str:
    """Results of other versions: counted and told apart, in no table above."""
    if not others:
        return ""
    why = Counter("; ".join(result["other"]) for result in others)
    rows = [[str(number), reason] for reason, number in why.most_common()]
    return "## Results of other versions, in no table above\n\n" + table(["results", "what differs"], rows)


def _notes(grid: Grid, config: str | Path) -> str:
    return "\n".join(
        [
            "## How to read this, and how to repeat it",
            "",
            f"- Harm refused: the prompts of {', '.join(list(SETS)[:3])} together. All shares in %, with 95 % "
            "intervals: Wilson for one seed, a bootstrap of seeds and prompts for several.",
            "- Refusals are judged by keywords unless the configuration names other judges, on the first "
            f"{grid.evaluate['max_new_tokens']} tokens; a response that is empty or a loop is incoherent, not a "
            "refusal. Coherent: the share that is neither, a proxy.",
            "- Poisoned examples are templated: they agree to do what a harmful prompt of AdvBench's training half "
            "asks, and hold no harmful content.",
            "- The validation split is for choosing thresholds and weights, the test split is read once. Both hold "
            "whole groups of near-duplicates, and none of what is trained on.",
            f"- Every figure, prompt by prompt: `{Path(grid.page).stem}/results.jsonl`, `results.csv`.",
            f"- One row: `python -m method_comparison.compare --config {config} --only ARM --seeds N --tasks TASK "
            "--poisoned-shares X`, and with `--repeat-in DIR` the same cell again, compared with the published one. "
            f"Each cell's own YAML and journal are in `{grid.output_dir}/cells/`.",
        ]
    )
