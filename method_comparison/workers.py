"""Cells in processes of their own: what one leaves behind in memory is gone with it, and one that dies is a result.

Apart from `compare`, which is run as a script: a process that is spawned imports what it is to do by its module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from threading import Thread
from typing import Any

from safemerge_callback.errors import ConfigError

from .cells import died, run_cell
from .grid import Grid, GridCell, parent_of
from .results import Result, result_of


def share_threads(workers: int) -> None:
    """Give each of `workers` processes its share of the cores, here and in what is started from here.

    ConfigError for less than 0 workers.
    """
    import torch

    if workers < 0:
        raise ConfigError(f"workers is {workers}: give 0, for this process itself, or more")
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, workers))))
    torch.set_num_threads(int(threads))


def run_cells(
    grid: Grid, cells: Sequence[GridCell], stamp: Mapping[str, Any], workers: int
) -> Iterator[tuple[GridCell, Result]]:
    """Run the cells and yield each with its result as it ends: `workers` at a time, or one by one in this process (0).

    A cell begins after the one whose adapter it merges. A process that dies, out of memory or killed, is its cell's
    error.
    """
    if not workers:
        for cell in cells:
            yield cell, run_cell(grid, cell, stamp)
        return
    left, running = list(cells), dict[SpawnProcess, GridCell]()
    try:
        while left or running:
            while len(running) < workers and (begin := _next(grid, left, list(running.values()))) is not None:
                left.remove(begin)
                running[_start(grid, begin, stamp)] = begin
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                yield running[process], _result(grid, running.pop(process), stamp, process)
    finally:
        for process in running:
            process.terminate()
            process.join()


def _next(grid: Grid, left: Sequence[GridCell], running: Sequence[GridCell]) -> GridCell | None:
    """The first cell that waits for no other; those that a cell waits for come before it."""
    return next((cell for cell in left if parent_of(grid, cell) not in [*left, *running]), None)


def _start(grid: Grid, cell: GridCell, stamp: Mapping[str, Any]) -> SpawnProcess:
    # Spawned: a fork of a process with threads may hang.
    process = get_context("spawn").Process(target=_run, args=(grid, cell, dict(stamp)), name=cell.name)
    process.start()
    return process


def _run(grid: Grid, cell: GridCell, stamp: Mapping[str, Any]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    run_cell(grid, cell, stamp)


def _end_with_parent() -> None:
    """A grid that was killed outright leaves nobody to stop the cell, and the next one would run it a second time."""
    parent = parent_process()
    assert parent is not None, "a cell's process was started by a grid's"
    wait([parent.sentinel])
    os._exit(1)


def _result(grid: Grid, cell: GridCell, stamp: Mapping[str, Any], process: SpawnProcess) -> Result:
    process.join()
    if process.exitcode:
        return died(grid, cell, stamp, f"the cell's process ended with {process.exitcode}; a negative one is a signal")
    result = result_of(grid, cell)
    assert result is not None, "run_cell writes a result whatever happens"
    return result
