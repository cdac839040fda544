"""Cells in processes of their own."""

import os
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from method_comparison import workers
from method_comparison.cells import RESULT
from method_comparison.grid import cells_of, make_grid
from safemerge_callback.errors import ConfigError

# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def grid(tmp_path):
    """Two arms that train and a merge of each one's adapter; nothing is run, so no file is named."""
    merge = {"kind": "posthoc", "settings": {"safety": "safety", "gate": "all"}}
    arms = {"plain": {}, "other": {}, "merged": {**merge, "parent": "plain"}, "also": {**merge, "parent": "other"}}
    raw = {
        "output_dir": str(tmp_path / "grid"),
        "model": str(tmp_path / "aligned"),
        "unaligned": str(tmp_path / "unaligned"),
        "target_modules": ["q_proj"],
        "seeds": [1],
        "tasks": ["cities"],
    }
    return make_grid({**raw, "arms": arms})


@dataclass(eq=False)
class Finished:
    """A process that ended when it was told to."""

    name: str
    sentinel: int
    exitcode: int = 0

    def is_alive(self):
        return False

    def join(self): ...


def test_a_merge_waits_for_the_adapter_and_no_more_run_than_workers(grid, monkeypatch):
    begun, ended, most = [], [], []

    def start(grid, cell, stamp):
        begun.append(cell.arm.name)
        most.append(len(begun) - len(ended))
        if cell.arm.parent:
            assert cell.arm.parent in ended
        read, write = os.pipe()
        os.close(write)
        return Finished(cell.name, read)

    def result(grid, cell, stamp, process):
        os.close(process.sentinel)
        ended.append(cell.arm.name)
        return {"arm": cell.arm.name}

    monkeypatch.setattr(workers, "_start", start)
    monkeypatch.setattr(workers, "_result", result)
    found = [result["arm"] for _, result in workers.run_cells(grid, cells_of(grid), {}, 2)]
    assert begun[:2] == ["plain", "other"]
    assert sorted(found) == ["also", "merged", "other", "plain"]
    assert max(most) == 2


def test_a_process_that_dies_is_its_cells_error_and_the_rest_go_on(grid, monkeypatch):
    def start(grid, cell, stamp):
        process = get_context("spawn").Process(target=os.abort)
        process.start()
        return process

    monkeypatch.setattr(workers, "_start", start)
    cells = cells_of(grid, ["plain", "other"])
    found = dict(workers.run_cells(grid, cells, {"commit": "x"}, 1))
    assert [result["error"] for result in found.values()] == [
        "the cell's process ended with -6; a negative one is a signal"
    ] * 2
    assert all((Path(grid.output_dir) / "cells" / cell.name / RESULT).is_file() for cell in cells)


def test_a_cell_that_cannot_run_has_the_same_result_in_a_process_of_its_own(grid):
    (cell,) = cells_of(grid, ["plain"])
    (here,) = (result for _, result in workers.run_cells(grid, [cell], {"commit": "x"}, 0))
    (there,) = (result for _, result in workers.run_cells(grid, [cell], {"commit": "x"}, 1))
    assert here["error"]
    assert {**there, "date": None} == {**here, "date": None}


def test_what_is_running_ends_with_whoever_asked_for_it(grid, monkeypatch):
    started = []

    def start(grid, cell, stamp):
        process = get_context("spawn").Process(target=os.abort if not started else _wait)
        process.start()
        started.append(process)
        return process

    monkeypatch.setattr(workers, "_start", start)
    running = workers.run_cells(grid, cells_of(grid, ["plain", "other"]), {"commit": "x"}, 2)
    next(running)
    running.close()
    assert [process.is_alive() for process in started] == [False, False]


def _wait():
    import time

    time.sleep(600)


def test_threads_are_shared_out_unless_their_number_is_set(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        workers.share_threads(4)
        assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("2", 2)
        workers.share_threads(1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ConfigError, match="workers is -1"):
        workers.share_threads(-1)
