"""docs/trainers.md holds every cell of the matrix, and none that failed."""

from pathlib import Path

import pytest

from benchmarks.trainers.cell import CellOutcome, TrainerCell
from benchmarks.trainers.page import BEGIN, END, row, write_page
from benchmarks.trainers_matrix import CELLS, PAGE

TEXT = PAGE.read_text(encoding="utf-8")
TABLES = TEXT.partition(BEGIN)[2].partition(END)[0]


def cell(**more):
    return TrainerCell("g", "a cell", make=None, **more)


def test_the_page_has_every_cell_and_no_failure():
    rows = [line.split(" | ") for line in TABLES.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    found = {cells[0].removeprefix("| "): cells[1] for cells in rows}
    assert {c.name for c in CELLS} == found.keys()
    assert set(found.values()) <= {"works", "refused", "not run"}


def test_a_cell_that_does_not_work_says_why_on_the_page():
    for line in TABLES.splitlines():
        if "| refused |" in line or "| not run |" in line:
            assert len(line.rstrip("| ").rpartition("| ")[2]) > 20, line


def test_a_remark_is_one_sentence_without_a_path():
    outcome = CellOutcome(cell(needs="a GPU"), "unavailable", "OSError: no /tmp/some/file here. Then more")
    assert row(outcome) == "| a cell | not run |  |  |  | needs a GPU; without: OSError: no a folder here |"


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(page, [CellOutcome(cell(), "works", "", 4, 3, 1e-7, 0.0, "float32", 1.0)])
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| a cell | works | 4 modules, 3 times | 1e-07 (float32) | 0e+00 |  |" in text


def test_a_page_without_markers_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_page(page, [])


def test_the_page_is_where_the_script_says():
    assert Path("docs") / "trainers.md" == PAGE.relative_to(PAGE.parents[1])
