"""Which arm keeps refusals, at what price? A grid of arms × tasks × poisoned shares × seeds, and its page.

    python -m method_comparison.compare --config method_comparison/grids/smollm2.yaml
    python -m method_comparison.compare --config GRID --only plain every_10 --seeds 1 2 --tasks sentiment
    python -m method_comparison.compare --config GRID --take-published --only ema --seeds 2
    python -m method_comparison.compare --config GRID --page-only
    python -m method_comparison.compare --config GRID --only plain --seeds 1 --repeat-in runs/again

Everything is resolved and checked before the first cell. A cell is a run of recipes/finetune.py with its own YAML, or
a merge of another cell's adapter, or a model as it is; its result is beside it, so a grid that was stopped goes on
where it was. Cells run in processes of their own, `--workers` at a time, the cores shared out among them. A cell that
fails is recorded, the rest go on, and it is tried again next time. The page, its plots, results.jsonl and results.csv
are written from the results that there are. `--take-published` counts the results beside the page as done: a clone has
those and no cells. `--repeat-in` runs cells again in another folder and compares them with the published ones, prompt
by prompt.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from recipes.command import run_command
from recipes.data.splits import SETS, prompts_of, rows_of
from recipes.data.tasks import get_task
from recipes.processor import measured_pace
from safemerge_callback.io.whole_file import whole_file

from .grid import Grid, GridCell, cells_of, load_grid
from .page import write_page
from .resolve import check_cells, resolved
from .results import (
    beside_published,
    elsewhere,
    one_version,
    others_of,
    published_results,
    result_of,
    run_since,
    sort_out,
    take_published,
    with_parents,
    write_results,
)
from .stamp import stamp_of
from .workers import run_cells, share_threads

Say = Callable[[str], None]
# SmolLM2-135M on 2 CPU cores in float32: 60 steps of 8 rows took 60 to 125 s, generation made 126 to 255 tokens/s.
SECONDS_A_ROW = (60 / 480, 125 / 480)
TOKENS_A_SECOND = (255.0, 126.0)
# A refusal ends before max_new_tokens: at best half of them are made.
SHARE_OF_TOKENS = (0.5, 1.0)
# Loading a model and an adapter, or a merge after training.
OVERHEAD = (2.0, 10.0)


def run_grid(
    grid: Grid, cells: Sequence[GridCell], keep_others: bool = False, say: Say = print, workers: int = 0
) -> None:
    """Run every cell that has no result yet, as `run_cells` does; results.jsonl and results.csv grow with each.

    Raises ConfigError, before the first cell, for settings that cannot be and for results of other versions.
    """
    check_cells(grid, cells)
    stamp = stamp_of(grid)
    # Of all cells, whichever are run now: an arm run today is not to be compared with one of another version.
    everywhere = sort_out(grid, cells_of(grid), stamp, keep_others)
    left = with_parents(grid, [cell for cell in cells if cell in everywhere])
    say(f"{len(cells) - len(left)} of {len(cells)} cells are done. To do: {estimate(grid, left)}.")
    if any(cell.arm.kind != "model" for cell in left):
        build_subspaces(grid)
    for place, (cell, result) in enumerate(run_cells(grid, left, stamp, workers), 1):
        write_results(grid, cells_of(grid))
        spent = sum(result["seconds"].values())
        say(f"[{place}/{len(left)}] {cell.name}: {result['error'] or 'done'} ({spent:.0f} s)")


def estimate(grid: Grid, cells: Sequence[GridCell]) -> str:
    """Return how long the cells are likely to take on 2 CPU cores, in words."""
    spans = [seconds_of(grid, cell) for cell in cells]
    low, high = (sum(span[i] for span in spans) for i in (0, 1))
    size, unit = (3600, "hours") if high > 3600 else (60, "minutes")
    trained = sum(cell.arm.kind == "train" for cell in cells)
    return (
        f"{len(cells)} cells, {trained} of them trained: about {low / size:.1f} to {high / size:.1f} {unit} at the "
        f"pace of a 135M model on 2 CPU cores in float32{_slower(grid) if cells else ''}"
    )


def seconds_of(grid: Grid, cell: GridCell) -> tuple[float, float]:
    """Return the least and most seconds that a cell is likely to take, by the paces above."""
    prompts = sum(len(prompts_of(name, grid.split, grid.evaluate[name])) for name in SETS)
    task = get_task(cell.task)
    tokens = prompts * grid.evaluate["max_new_tokens"]
    tokens += len(rows_of(task, grid.split, grid.evaluate["task"])) * task.max_new_tokens
    rows = 0
    if cell.arm.kind == "train":
        settings = resolved(grid, cell)
        each = settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1)
        rows = max(int(settings.get("max_steps", 0)), 0) * each
    low, high = (
        rows * row + SHARE_OF_TOKENS[i] * tokens / pace + OVERHEAD[i]
        for i, (row, pace) in enumerate(zip(SECONDS_A_ROW, TOKENS_A_SECOND, strict=True))
    )
    return low, high


def _slower(grid: Grid) -> str:
    """Say so where the grid asks the machine for bfloat16, and its products were measured to be slower there."""
    # SFTConfig's own default is bf16.
    in_bfloat16 = grid.finetune.get("bf16", True) or grid.evaluate["dtype"] == "bfloat16"
    pace = measured_pace()
    if pace.ratio >= 1 or not in_bfloat16:
        return ""
    return (
        f", and longer in bfloat16 ({pace}): take a grid with finetune: {{bf16: false}} and "
        "evaluate: {dtype: float32}, such as method_comparison/grids/smollm2_float32.yaml"
    )


def build_subspaces(grid: Grid) -> None:
    """Write the safety subspace, its random control and the rows in nobody's own words, unless they are there."""
    from recipes.data.foreign import foreign_rows
    from recipes.models import checkpoint
    from safemerge_callback import build_subspace
    from safemerge_callback.evaluation.rows import rows_text

    from .random_subspace import random_subspace

    if not grid.subspace.is_file():
        aligned, unaligned = checkpoint(grid.model), checkpoint(grid.unaligned)
        build_subspace(grid.subspace, aligned=aligned, unaligned=unaligned, target_modules=list(grid.target_modules))
    if not grid.random_subspace.is_file():
        random_subspace(grid.subspace, grid.random_subspace, seed=grid.random_subspace_seed)
    if not grid.foreign_rows.is_file():
        with whole_file(grid.foreign_rows) as part:
            part.write_text(rows_text(foreign_rows()), encoding="utf-8")


def repeat(grid: Grid, cells: Sequence[GridCell], folder: Path, workers: int = 0, say: Say = print) -> None:
    """Run the cells again in `folder`, and say a line a cell: what is as published. ConfigError where nothing is."""
    published, again = published_results(grid), elsewhere(grid, folder)
    run_grid(again, cells, say=say, workers=workers)
    repeated = [(cell, result) for cell in cells if (result := result_of(again, cell)) is not None]
    for line in beside_published(grid, repeated, published):
        say(line)


def go_on(grid: Grid, cells: Sequence[GridCell], keep_others: bool = False, workers: int = 0, say: Say = print) -> None:
    """Run the cells that are not published, and say a line for each published one that had to be run again for them.

    ConfigError where nothing is published, or what is does not mix with what would be run now.
    """
    published = published_results(grid)
    taken = take_published(grid, cells_of(grid), published, stamp_of(grid))
    say(f"{len(taken)} published results taken as done.")
    run_grid(grid, cells, keep_others, say, workers)
    for line in beside_published(grid, run_since(grid, cells_of(grid), published), published):
        say(line)


def main(args: Sequence[str] | None = None) -> None:
    """Run the grid, or the part of it that is asked for, and write the page."""
    options = _parser().parse_args(args)
    # Threads that spin while they wait slow a busy machine down, and forked tokenizers warn.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    share_threads(options.workers)
    grid = load_grid(options.config)
    cells = cells_of(grid, options.only, options.seeds, options.tasks, options.poisoned_shares)
    if options.repeat_in:
        repeat(grid, cells, options.repeat_in, options.workers)
        return
    if options.take_published:
        go_on(grid, cells, options.keep_others, options.workers)
    elif not options.page_only:
        run_grid(grid, cells, options.keep_others, workers=options.workers)
    # Beside the page, too: what is published with it, it can be checked against.
    written = write_results(grid, cells_of(grid), Path(grid.page).with_suffix(""))
    results, others = one_version(written, options.keep_others, grid.same_code)
    page = write_page(grid, options.config, results, [*others, *others_of(grid)])
    print(f"{len(results)} results; page: {page}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the grid, a YAML file in method_comparison/grids")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms, and those they build on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="these of the grid's seeds")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="these of the grid's tasks")
    parser.add_argument("--poisoned-shares", nargs="+", type=float, default=[], metavar="X", help="these of the grid's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--page-only", action="store_true", help="write the page of the results there are; run nothing")
    what.add_argument("--repeat-in", type=Path, metavar="DIR", help="run again in DIR; compare with the published")
    what.add_argument("--take-published", action="store_true", help="count the results beside the page as done")
    parser.add_argument("--keep-others", action="store_true", help="set results of other versions apart, list them")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time, each a process (0: none)")
    return parser


if __name__ == "__main__":
    run_command(main)
