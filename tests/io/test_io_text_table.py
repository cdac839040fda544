import pytest

from safemerge_callback.decision import MergePlan, Reading, Readings
from safemerge_callback.io.text_table import html_table
from safemerge_callback.offline.sweep.table import Cell, Sweep

NAME = "layers.0.<script>alert(1)</script>"


@pytest.fixture
def readings():
    return Readings([Reading(NAME, 0.21, 0.71, 1.5, 4, (8, 8)), Reading("layers.1.v_proj", 0.62, 0.94, 1.5, 4, (8, 8))])


@pytest.fixture(params=["readings", "plan", "sweep"])
def shown(request, readings):
    if request.param == "readings":
        return readings
    plan = MergePlan.decide(readings, threshold=0.35)
    cell = Cell("<b>", 0.35, "linear", "delta", (0.8, 0.2), 1, 2, 0.1, 0.9, 0.0)
    return {"plan": plan, "sweep": Sweep([cell], readings)}[request.param]


def test_what_a_notebook_shows_is_the_printed_table_with_every_text_escaped(shown):
    page = shown._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert page.count("<table>") == 1
    assert page.count("<tr>") == page.count("</tr>")
    lines = str(shown).splitlines()
    assert lines[0] in page
    # as many rows as between the rules of the printed table, and its head
    assert page.count("<tr>") == sum(line.startswith("│") for line in lines) + 1


def test_a_repr_is_one_short_line(shown):
    assert "\n" not in repr(shown)
    assert len(repr(shown)) < 200
    assert repr(shown).startswith(type(shown).__name__ + "(")
    assert "2 modules" in repr(shown)


def test_a_column_is_aligned_as_asked():
    page = html_table("t", ["name", "n"], [["a", "1"]], right=("n",))
    assert '<td style="text-align: left">a</td><td style="text-align: right">1</td>' in page
