"""Outputs appear whole, whatever stops their writing, and nothing hidden stays."""

import shutil

import pytest

from safemerge_callback import merge_adapters
from safemerge_callback.adapters import load_adapter, save_adapter
from safemerge_callback.adapters.factor_file import write_pairs
from safemerge_callback.decision import Readings
from safemerge_callback.errors import ConfigError, SafeMergeError
from safemerge_callback.offline.sweep.table import Cell, Sweep
from safemerge_callback.ops import LowRank
from safemerge_callback.record.history import Cell as Drift
from safemerge_callback.record.history import History
from safemerge_callback.reports import read_history, write_page, write_report
from safemerge_callback.reports.saving import save_figure
from safemerge_callback.subspace import compress_subspace
from safemerge_callback.training.checkpoints import replace_values


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(folder):
    return {path: data for path, data in files(folder).items() if path.suffix == ".safetensors"}


@pytest.mark.parametrize("bake", [None, pytest.param("aligned", marks=pytest.mark.slow)])
def test_a_forced_merge_killed_at_any_point_is_finished_by_a_rerun_and_kept_by_a_refusal(world, tmp_path, kills, bake):
    base = None if bake is None else world / bake

    def merge(output, share, overwrite=True):
        parts = (world / "task", world / "safety", world / "s.safetensors")
        merge_adapters(*parts, output, gate="all", weights=(1 - share, share), bake=base, overwrite=overwrite)

    first, second = world / "first", world / "second"
    merge(first, 0.2)
    merge(second, 0.5)
    old, new, points = files(first), weights(second), 0
    for place in kills(lambda k: shutil.copytree(first, world / str(k) / "out"), lambda place: merge(place, 0.5)):
        points += 1
        kept = shutil.copytree(place.parent, world / "kept" / str(points)) / "out"
        with pytest.raises(ConfigError, match="is not empty"):
            merge(kept, 0.5, overwrite=False)
        assert files(kept) == old or weights(kept) == new
        merge(place, 0.5)
        assert weights(place) == new
        assert [*place.parent.rglob(".*")] == []
    assert points >= 8


def test_a_merge_replaces_its_own_folder_with_the_report_that_was_made_there(world, tmp_path):
    parts = (world / "task", world / "safety", world / "s.safetensors")
    merge_adapters(*parts, tmp_path / "out")
    write_report(read_history(tmp_path / "out"), tmp_path / "out")
    merge_adapters(*parts, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "notes.html").write_text("somebody's")
    with pytest.raises(ConfigError, match=r"no part of an adapter, first 'notes.html'"):
        merge_adapters(*parts, tmp_path / "out", overwrite=True)


class Figure:
    """What matplotlib's does, as far as a file is concerned."""

    def savefig(self, path, **how):
        path.write_bytes(b"\x89PNG" + b"x" * 1000)


def writers(world):
    """Name of a file -> what writes it."""
    task = load_adapter(world / "task")
    cell = Cell("all", None, "linear", "delta", (0.8, 0.2), 1, 1, 0.1, 0.9, 0.0)
    pairs = {name: LowRank(f.A, f.B) for name, f in task.factors.items()}
    return {
        "task/adapter_model.safetensors": lambda path: save_adapter(path.parent, task),
        "factors.safetensors": lambda path: write_pairs(path, pairs),
        "report.html": lambda path: write_page(History("run", cells={("a", 1): Drift(0.5, 0.7, "measured")}), path),
        "plot.png": lambda path: save_figure(Figure(), path),
        "sweep.csv": lambda path: Sweep([cell] * 50, Readings(())).write_csv(path),
        "checkpoint/trainer_state.json": lambda path: replace_values(path.parent, "run", {"x": "y" * 500}),
        "s.int8.safetensors": lambda path: compress_subspace(world / "s.safetensors", path, progress=False),
    }


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(world, full_disk):
    (world / "checkpoint").mkdir()
    (world / "checkpoint" / "trainer_state.json").write_text('{"global_step": 2}')
    for name, write in writers(world).items():
        path = world / name
        write(path)
        old, beside = path.read_bytes(), sorted(path.parent.iterdir())
        with full_disk(300), pytest.raises((OSError, SafeMergeError), match=r"File too large|os error 27"):
            write(path)
        assert path.read_bytes() == old, name
        assert sorted(path.parent.iterdir()) == beside, name
        write(path)
