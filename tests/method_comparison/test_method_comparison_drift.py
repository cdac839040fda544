"""The edge that the callback warns by is what the published runs say."""

import shutil
from pathlib import Path

import pytest

from method_comparison import drift
from method_comparison.drift_measures import AdapterDrift, band_of, published_drifts
from method_comparison.grid import load_grid
from safemerge_callback.decision import BAND, Band

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "method_comparison" / "grids" / "smollm2.yaml"


def run(moved, harm):
    numbers = dict.fromkeys(AdapterDrift._fields, 0.0)
    return AdapterDrift(**{**numbers, "guarded": False, "merged": False, "moved": moved, "harm": harm})


def test_the_band_is_that_of_the_published_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert band_of([one for one in published_drifts(load_grid(CONFIG)).values() if not one.guarded]) == BAND


def test_a_clone_writes_the_page_on_drift_anew(tmp_path, monkeypatch):
    """Neither the adapters nor the subspaces are there: the table beside the page is enough."""
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    shutil.copytree(CONFIG.parent, tmp_path / "method_comparison" / "grids")
    monkeypatch.chdir(tmp_path)
    drift.main(["--config", "method_comparison/grids/smollm2.yaml", "--since", "2026-11-22T03:46", "--take-published"])
    assert (tmp_path / "docs" / "drift.md").read_text() == (ROOT / "docs" / "drift.md").read_text()


@pytest.mark.parametrize(
    ("runs", "band"),
    [
        ([(-1.0, 0.2), (-0.5, 0.9)], Band(-0.75, 1, 1, 1, 0)),
        # one run on the wrong side, and the lowest of two edges as good
        ([(-2.0, 0.1), (-1.0, 0.9), (0.0, 0.3), (1.0, 0.8)], Band(-1.5, 1, 1, 3, 1)),
        # just half is not lost
        ([(-1.0, 0.49), (0.0, 0.5)], Band(-0.5, 1, 1, 1, 0)),
        ([(-1.0, 0.2)], None),
    ],
)
def test_an_edge_by_hand(runs, band):
    assert band_of([run(*one) for one in runs]) == band
