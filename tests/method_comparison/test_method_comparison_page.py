"""What the page says of results made up by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from method_comparison import plots
from method_comparison.arms import chosen, read_arms
from method_comparison.cells import COLUMNS, counted, trail_of
from method_comparison.figures import HARM, matched, places_of, reference_arms, reference_of
from method_comparison.grid import cells_of, make_grid
from method_comparison.markdown import table
from method_comparison.page import write_page
from method_comparison.resolve import resolved
from method_comparison.results import beside_published, elsewhere, published_results
from method_comparison.stamp import COMPARED, differences, digest, settings_digest
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.measure import columns, share_of

STAMP = {
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
    "code": "c0de",
    "data": {"harmbench": "d1"},
    "model": {"m": "m-1"},
    "device": "cpu",
    "commit": "abc",
    "host": "2 cores",
}
GUARD = {"safemerge_subspace": "{subspace}"}


@pytest.fixture
def grid(tmp_path):
    arms = {
        "aligned": {"kind": "model", "about": "as it is"},
        "plain": {"about": "none"},
        "every_10": {"about": "a | b", "settings": GUARD},
        "end": {"kind": "posthoc", "parent": "plain", "points": {"w5": {}, "w4": {}}},
    }
    return make_grid(
        {
            "output_dir": str(tmp_path / "grid"),
            "page": str(tmp_path / "docs" / "results.md"),
            "model": "m",
            "unaligned": "u",
            "target_modules": ["q_proj"],
            "seeds": [1, 2],
            "tasks": ["sentiment"],
            "reference": "every_10",
            "contrasts": [["every_10", "end.w4"]],
            "arms": arms,
        }
    )


def result(grid, arm, seed, refused, right, **changed):
    """A cell in which `refused` of 10 prompts of each harmful set are refused, and `right` of 20 rows answered."""
    counts = {f"{name}_refused": (refused, 10) for name in ("harmbench", "strongreject", "advbench")}
    counts |= {"benign_refused": (1, 10), "task": (right, 20), "coherent": (40, 40)}
    measures = [columns(share_of(name, "1" * k + "0" * (n - k), "harm"), COLUMNS) for name, (k, n) in counts.items()]
    about = grid.arms[arm]
    return {
        "cell": f"sentiment/poisoned-0/{arm}/seed-{seed}",
        "arm": arm,
        "family": about.family,
        "kind": about.kind,
        "task": "sentiment",
        "poisoned_share": 0.0,
        "seed": seed,
        "split": "test",
        "settings": "s",
        "date": f"2026-11-2{seed}T00:00:00+00:00",
        "seconds": {"make": 3600.0, "evaluate": 1800.0},
        "measures": measures,
        "trail": None,
        "error": None,
        "stamp": STAMP,
        **changed,
    }


@pytest.fixture
def made(grid):
    figures = {"plain": (2, 18), "every_10": (8, 15), "end.w5": (6, 16), "end.w4": (10, 12)}
    found = [result(grid, arm, seed, *figures[arm]) for seed in (1, 2) for arm in figures]
    return [result(grid, "aligned", 1, 10, 0), *found]


def test_refusal_is_read_off_each_front_at_the_references_task_score(grid, made):
    (place,) = places_of(grid, made)
    found = matched(grid, place)
    # neither the reference itself, nor the baseline, nor a model as it is
    assert list(found) == ["end"]
    # between (0.6, 1.0) and (0.8, 0.6): what merging at the end gets at 0.75
    assert found["end"][:4] == ((1, 2), *(pytest.approx(value) for value in (0.75, 0.8, 0.7)))
    assert found["end"].above.value == pytest.approx(0.1)
    assert place.point("end.w5") == pytest.approx((0.8, 0.6))


def test_a_share_that_stands_under_more_alone_has_its_place(grid, made):
    more = replace(grid, more=[{"arms": ["plain", "every_10"], "seeds": [1], "poisoned_shares": [0.5]}])
    poisoned = [result(grid, arm, 1, 4, 15, poisoned_share=0.5) for arm in ("plain", "every_10")]
    places = places_of(more, [*made, *poisoned])
    assert [(place.task, place.poisoned_share) for place in places] == [("sentiment", 0.0), ("sentiment", 0.5)]
    assert list(places[1].arms) == ["aligned", "plain", "every_10"]
    assert places[1].seeds("plain") == {1}


def test_a_familys_front_begins_at_the_baseline(grid, made):
    only = [r for r in made if r["arm"] in ("plain", "every_10", "end.w4")]
    (place,) = places_of(grid, only)
    # one point (0.6, 1.0), and plain at (0.9, 0.2)
    assert matched(grid, place)["end"].front == pytest.approx(1.0 - 0.8 * 0.15 / 0.3)


def test_an_arm_is_compared_with_the_references_front_at_its_own_score(grid, made):
    (place,) = places_of(grid, made)
    assert reference_arms(grid, place) == ["every_10", "plain"]
    # (0.8, 0.6) against the line from (0.75, 0.8) to (0.9, 0.2)
    assert place.at_score("end.w5", ["every_10", "plain"]).above.value == pytest.approx(0.0)
    assert place.at_score("end.w4", ["every_10", "plain"]).above is None
    page = write_page(grid, "x.yaml", made).read_text()
    assert "less what the front of every_10, plain refuses there" in page


def test_an_arm_may_be_a_point_of_another_front(grid):
    raw = {"plain": {}, "every_10": {}, "at": {"family": "every_10", "points": {"w9": {}}}}
    assert {name: arm.family for name, arm in read_arms(raw).items()} == {
        "plain": "plain",
        "every_10": "every_10",
        "at.w9": "every_10",
    }
    # asked for by name: a point of its front is another arm
    assert chosen(read_arms(raw), ["every_10"]) == ["every_10"]
    assert chosen(read_arms(raw), ["at"]) == chosen(read_arms(raw), ["at.w9"]) == ["at.w9"]


def test_a_front_that_ends_above_the_score_is_a_lower_bound(grid, made):
    only = [r for r in made if r["arm"] not in ("end.w4",)]
    page = write_page(grid, "x.yaml", only).read_text()
    assert "| end | 2 | 75.0 | 80.0 | 60.0 or more |  |" in page
    # nothing is known of the difference, so the summary leaves it out
    assert "## In short" not in page


def test_seeds_that_a_front_lacks_are_left_out_of_its_row(grid, made):
    more = [*made, result(grid, "every_10", 3, 0, 0), result(grid, "plain", 3, 0, 0)]
    (place,) = places_of(grid, more)
    assert matched(grid, place)["end"][:4] == ((1, 2), *(pytest.approx(value) for value in (0.75, 0.8, 0.7)))


def test_arms_with_all_of_the_references_seeds_are_a_front_of_their_own(grid, made):
    more = [*made, *(result(grid, arm, 3, 6, 15) for arm in ("every_10", "plain", "end.w5"))]
    (place,) = places_of(grid, more)
    found = matched(grid, place)
    assert list(found) == ["end", "end.w5"]
    assert [one.seeds for one in found.values()] == [(1, 2), (1, 2, 3)]
    (place,) = places_of(grid, made)
    assert list(matched(grid, place)) == ["end"]


def test_the_summary_has_a_column_a_place(grid, made):
    grid = replace(grid, poisoned_shares=[0.0, 0.1])
    other = [{**r, "poisoned_share": 0.1} for r in made if r["arm"] in ("plain", "every_10")]
    summary = write_page(grid, "x.yaml", [*made, *other]).read_text().split("## In short")[1].split("\n## ")[0]
    assert "| front of | sentiment, 0 % poisoned | sentiment, 10 % poisoned |" in summary
    assert "| end | +10.0 (" in summary
    assert ", 2 seeds |  |" in summary
    assert "| every_10 less end.w4 | harm refused | -20.0 (" in summary
    assert "| every_10 less end.w4 | task | +15.0 (" in summary


def test_the_reference_may_be_a_familys_name(grid, made):
    (place,) = places_of(grid, made)
    assert reference_of(grid, place) == "every_10"
    assert reference_of(replace(grid, reference="end"), place) == "end.w5"
    (place,) = places_of(grid, [r for r in made if r["arm"] == "plain"])
    assert reference_of(grid, place) is None
    assert matched(grid, place) == {}


def test_differences_are_paired_by_seed_and_prompt(grid, made):
    (place,) = places_of(grid, made)
    found = place.difference("end.w5", "every_10", HARM)
    assert found.value == pytest.approx(-0.2)
    assert found.low < -0.2 < found.high < 0
    assert place.difference("plain", "plain", "task") == (0.0, 0.0, 0.0)
    assert place.difference("plain", "nobody", "task") is None


def test_the_page_holds_the_figures_and_what_they_come_from(grid, made):
    failed = result(grid, "plain", 3, 0, 0, error="RuntimeError: no | room\nmore", measures=[])
    other = {**made[0], "other": ["peft 0.1 and not 0.21.2"]}
    page = write_page(grid, "method_comparison/grids/x.yaml", [*made, failed], [other, other]).read_text()
    assert "cells: 9 of 9 done, 1 failed; split: test" in page
    assert "hours spent: 15.0" in page
    assert "versions: torch 2.13.0, peft 0.21.2" in page
    assert "dates: 2026-11-21 to 2026-11-23" in page
    assert "| end.w5 | 2 | 60.0 (" in page
    assert "| aligned | 1 | 100.0 (89-100)" in page
    assert "at every_10's own task score, interpolated" in page
    assert "| end | 2 | 75.0 | 80.0 | 70.0 | +10.0 (" in page
    assert "| every_10 | train |  | a \\| b |" in page
    assert "| sentiment/poisoned-0/plain/seed-3 | RuntimeError: no \\| room |" in page
    assert "| 2 | peft 0.1 and not 0.21.2 |" in page
    assert "templated" in page
    assert "| end.w5 | -20.0 (" in page.split("Less every_10")[1]


def test_an_arm_that_lost_its_task_does_not_squeeze_the_plot(grid, made):
    def axis(results):
        return plots._fronts(grid, places_of(grid, results)).axes[0]

    assert axis(made).get_xlabel() == "task score"
    lost = [one if one["arm"] != "end.w4" else result(grid, "end.w4", one["seed"], 10, 0) for one in made]
    shown = axis(lost)
    assert shown.get_xlabel() == "task score; left of it: end.w4"
    assert 0 < shown.get_xlim()[0] < 15 / 20


def test_a_page_of_nothing_says_so(grid):
    page = write_page(grid, "x.yaml", []).read_text()
    assert "cells: 0 of 9 done, 0 failed" in page
    assert "none, nothing was run" in page
    assert "![" not in page


def test_a_response_without_a_verdict_is_not_counted():
    measure = counted(share_of("harmbench_refused", "11u0i", "harm"))
    assert (measure["n"], measure["value"]) == (4, 0.5)
    with pytest.raises(ConfigError, match="'harmbench_refused': no response has a verdict"):
        counted(share_of("harmbench_refused", "uu", "harm"))


def test_stamps_differ_where_results_would():
    assert differences(STAMP, {**STAMP, "commit": "other", "host": "other"}) == []
    for key in COMPARED:
        assert differences(STAMP, {**STAMP, key: "other"})
    newer = {**STAMP, "versions": {"torch": "3", "trl": "1"}}
    assert differences(STAMP, newer) == ["peft 0.21.2 and not None", "torch 2.13.0 and not 3", "trl None and not 1"]
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])
    assert settings_digest({"a": 1}, {"n": (1, 2)}) == settings_digest({"a": 1}, {"n": [1, 2]})
    assert settings_digest({"a": 1}, {}) != settings_digest({"a": 2}, {})


def test_a_trail_counts_merges_a_module(tmp_path):
    modules = [{"name": "q", "cosine": 0.2}, {"name": "v", "cosine": None}]
    entries = [
        {"kind": "start", "num_modules": 2},
        {"kind": "check", "step": 5, "modules": modules},
        {"kind": "merge", "step": 5, "modules": [{"name": "q", "task_weight": 0.8}]},
        {"kind": "probe", "step": 5, "when": "before", "measures": [{"measure": "x", "value": 0.0}]},
        {"kind": "probe", "step": 5, "when": "after", "measures": [{"measure": "x", "value": 0.5}]},
        {"kind": "merge", "step": 9, "modules": [{"name": "q", "task_weight": 0.6}]},
    ]
    (tmp_path / "safemerge.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert trail_of(tmp_path) == {
        "modules": 2,
        "merges": 2,
        "merged": {"q": 2},
        "task_weight": pytest.approx(0.8),
        "checks": [[5, 0.2]],
        "probes": [[5, {"x": 0.5}]],
    }
    assert trail_of(None) is None
    assert trail_of(tmp_path / "absent") is None


def test_bars_in_a_tables_cells_are_escaped():
    assert table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"


def test_a_cell_that_was_repeated_is_compared_prompt_by_prompt(grid, made):
    folder = Path(grid.page).with_suffix("")
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    published = published_results(grid)
    cell, other = cells_of(grid, ["plain"])
    settings = settings_digest(resolved(grid, cell), grid.evaluate)
    published["sentiment/poisoned-0/plain/seed-1"]["settings"] = settings
    name = "sentiment/poisoned-0/plain/seed-1"
    assert beside_published(grid, [(cell, made[1])], published) == [f"{name}: 100 of 100 outcomes equal"]
    changed = result(grid, "plain", 1, 3, 18, stamp={**STAMP, "code": "new"})
    (line,) = beside_published(grid, [(cell, changed)], published)
    assert "97 of 100 outcomes equal (other: harmbench_refused 1, strongreject_refused 1, advbench_refused 1)" in line
    assert line.endswith("; code c0de and not new")
    shorter = {**made[1], "measures": [{**made[1]["measures"][0], "outcomes": "1" * 3}, *made[1]["measures"][1:]]}
    (line,) = beside_published(grid, [(cell, shorter)], published)
    assert " of 100 outcomes equal (other: harmbench_refused " in line
    del published["sentiment/poisoned-0/plain/seed-2"]
    failed = {**made[1], "error": "OSError: full"}
    assert beside_published(grid, [(other, made[5]), (cell, failed)], published) == [
        "sentiment/poisoned-0/plain/seed-2: published without figures",
        f"{name}: OSError: full",
    ]


def test_cells_are_repeated_in_another_folder_only(grid, tmp_path):
    with pytest.raises(ConfigError, match="holds the grid's own cells: give another folder"):
        elsewhere(grid, grid.output_dir)
    assert elsewhere(grid, tmp_path / "again").page == str(tmp_path / "again" / "results.md")
    with pytest.raises(ConfigError, match=r"results\.jsonl' holds no results.*run the grid first"):
        published_results(grid)
