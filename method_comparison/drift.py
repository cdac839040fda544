"""Does what the callback measures tell which runs lost their refusals? The adapters of a grid, measured afterwards.

    python -m method_comparison.drift --config method_comparison/grids/smollm2.yaml

Reads the adapters and results that `method_comparison.compare` left in the grid's output_dir, and writes drift.md,
drift.csv and drift.svg beside the grid's page. Nothing is trained or asked again. `--take-published` keeps the runs
that drift.csv holds, and measures the others: adapters are not published. So a clone writes the page anew, and in it
the edge of `moved` below which refusals were lost, which the callback warns by.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from recipes.command import run_command
from safemerge_callback.errors import ConfigError

from .drift_measures import (
    LOST,
    OPPOSED,
    TABLE,
    AdapterDrift,
    band_of,
    correlation_interval,
    drifts,
    published_drifts,
    rank_correlation,
    sides_of,
)
from .grid import Grid, cells_of, load_grid
from .markdown import table
from .plots import write_drift_plot


def main(args: Sequence[str] | None = None) -> None:
    """Measure and write; ConfigError where the grid has no adapter with a result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the grid, a YAML file in method_comparison/grids")
    parser.add_argument("--since", default="", metavar="TIME", help="also set apart the runs since then")
    parser.add_argument("--take-published", action="store_true", help="keep the runs that drift.csv holds as they are")
    options = parser.parse_args(args)
    grid = load_grid(options.config)
    published = published_drifts(grid) if options.take_published else {}
    adapters = drifts(grid, cells_of(grid), published) if published or grid.subspace.is_file() else []
    if not adapters:
        raise ConfigError(
            f"{grid.output_dir!r} holds no adapter with a result: run `python -m method_comparison.compare` first"
        )
    print(f"{len(adapters)} adapters; page: {write_drift(grid, options.config, adapters, options.since)}")


def write_drift(grid: Grid, config: str | Path, adapters: Sequence[AdapterDrift], since: str = "") -> Path:
    """Write drift.md beside the grid's results.md, or drift_X.md beside results_X.md; return the page.

    drift.csv and drift.svg go into the folder of the grid's page. Runs that were begun from `since` on, an ISO time,
    are also correlated by themselves.
    """
    results = Path(grid.page)
    page, folder = results.with_name(f"drift{results.stem.removeprefix('results')}.md"), results.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(AdapterDrift._fields)
        rows.writerows(adapters)
    plot = write_drift_plot(adapters, folder / "drift.svg")
    unmerged = [one for one in adapters if not one.merged]
    parts = [
        _head(f"{config} --since {since}" if since else str(config), results.name, adapters, since),
        f"![Cosines and refusals]({plot.relative_to(page.parent).as_posix()})",
        f"## Rank correlation with the harm refused\n\n{_correlations(adapters, since)}",
        *_bands(adapters, since),
        f"## Runs without a safety adapter\n\n{_runs(unmerged)}",
        f"## All runs\n\n{_runs(adapters)}",
    ]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _head(call: str, results: str, adapters: Sequence[AdapterDrift], since: str) -> str:
    tried = f", those before {since}; the later ones are its test" if since else ""
    return "\n".join(
        [
            "# What tells that refusals are lost?",
            f"Written by `python -m method_comparison.drift --config {call}`; edit the recipe, not this page.",
            "",
            f"{len(adapters)} adapters of the [comparison]({results}), measured against its safety subspace when they "
            "were done; none of them was chosen or tuned by these figures.",
            "",
            "- cosine: the papers' projected cosine ρ, mean over the modules. It is the same for an update and for its "
            "negative.",
            "- signed z: the signed cosine ⟨V, ΔW⟩/(‖V‖·‖ΔW‖) in standard deviations of an unrelated update's, mean "
            "over the modules; below 0 an update takes back what aligned the model.",
            f"- opposed: modules whose signed z lies below {OPPOSED:g}.",
            "- control z: signed z against a subspace of the same spectrum with random directions. norm: ‖ΔW‖ over all "
            "modules, the simplest measure there is.",
            "- moved: signed z · ‖ΔW‖, mean over the modules: how far the update goes along V, where signed z is the "
            f"direction alone. It was thought of when runs had been seen{tried}.",
            "- Intervals are of 95 % (Bonett and Wright 2000), as if runs were independent, which those of one task or "
            "seed are not quite.",
            "- Only runs into which no safety adapter was merged say what a measure tells of drift: the adapter itself "
            "lies along V, whether or not it brings refusals back.",
        ]
    )


def _correlations(adapters: Sequence[AdapterDrift], since: str) -> str:
    measures: dict[str, Callable[[AdapterDrift], float]] = {
        "cosine": lambda one: one.cosine,
        "signed z": lambda one: one.signed_z,
        "opposed": lambda one: one.opposed,
        "control z": lambda one: one.control_z,
        "norm": lambda one: one.norm,
        "moved": lambda one: one.moved,
    }
    sets = {
        "update left as it was": [one for one in adapters if not one.guarded],
        "no safety adapter merged in": [one for one in adapters if not one.merged],
        "all": list(adapters),
    }
    if since:
        later = {f"{name}, since {since}": [one for one in runs if one.date >= since] for name, runs in sets.items()}
        sets |= later
    rows = []
    for name, runs in sets.items():
        harm = [one.harm for one in runs]
        values = (rank_correlation([of(one) for one in runs], harm) for of in measures.values())
        rows.append([name, str(len(runs)), *(_with_interval(value, len(runs)) for value in values)])
    return table(["runs", "n", *measures], rows)


def _bands(adapters: Sequence[AdapterDrift], since: str) -> list[str]:
    """The section on the edge below which refusals are lost; nothing where too few runs were left as they were."""
    left = [one for one in adapters if not one.guarded]
    band = band_of(left)
    if band is None:
        return []
    sets = {
        "update left as it was": (band.edge, left),
        "changed, no safety adapter merged in": (band.edge, [o for o in adapters if o.guarded and not o.merged]),
        "safety adapter merged in": (band.edge, [one for one in adapters if one.merged]),
    }
    earlier = band_of([one for one in left if one.date < since])
    if earlier:
        sets["left as it was, since then, by an edge from those before"] = (
            earlier.edge,
            [one for one in left if one.date >= since],
        )
    known = ["runs", "edge", "below", "lost", "refused, %", "not below", "lost", "refused, %"]
    rows = [
        [name, f"{edge:g}", *(word for side in sides_of(edge, runs) for word in _side(side))]
        for name, (edge, runs) in sets.items()
    ]
    about = (
        f"Lost is fewer than {100 * LOST:.0f} % refused. The edge leaves the fewest runs of the first row on the wrong "
        "side of it (`band_of` in `method_comparison/drift_measures.py`), to a twentieth; refusals are medians, with "
        "the least and the most. The first row is `BAND` in `safemerge_callback/decision/reading.py`. It is of updates "
        "that were left as they were, on one model: another may have another scale. A safety adapter that was merged "
        "in lies along V itself, so that not to be below the edge then says nothing."
    )
    return [f"## Where refusals are lost\n\n{about}\n\n{table(known, rows)}"]


def _side(harm: Sequence[float]) -> tuple[str, str, str]:
    if not harm:
        return "0", "", ""
    low, middle, high = (100 * float(value) for value in (min(harm), np.median(harm), max(harm)))
    return str(len(harm)), str(sum(one < LOST for one in harm)), f"{middle:.1f} ({low:.1f} to {high:.1f})"


def _with_interval(rho: float, n: int) -> str:
    low, high = correlation_interval(rho, n)
    if n < 4 or math.isnan(rho):
        return ""
    return f"{rho:+.2f}" if math.isnan(low) else f"{rho:+.2f} ({low:+.2f} to {high:+.2f})"


def _runs(adapters: Iterable[AdapterDrift]) -> str:
    rows = [
        [
            *(one.task, f"{100 * one.poisoned_share:.0f} %", one.arm, str(one.seed)),
            *(f"{one.cosine:.3f}", f"{one.signed_z:+.2f}", str(one.opposed), f"{one.control_z:+.2f}"),
            *(f"{one.norm:.2f}", f"{one.moved:+.2f}"),
            *(f"{100 * one.harm:.1f}", f"{100 * one.score:.1f}"),
        ]
        for one in adapters
    ]
    known = ["task", "poisoned", "arm", "seed", "cosine", "signed z", "opposed", "control z", "norm", "moved"]
    return table([*known, "harm refused, %", "task score, %"], rows)


if __name__ == "__main__":
    run_command(main)
