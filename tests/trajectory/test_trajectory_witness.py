"""The witness sees what changes, lets pass what is only added, and gives the same twice."""

import copy
import os
import subprocess
import sys

import pytest

from tests.trajectory.witness import __main__ as command
from tests.trajectory.witness import evidence, training
from tests.trajectory.witness.comparison import compared, table
from tests.trajectory.witness.world import make_world

CHECK = {"kind": "check", "step": 2, "modules": [{"name": "a", "cosine": 0.5}, {"name": "b", "cosine": 0.25}]}
SIDE = {"run/factors": {"2": "ab", "end": "cd"}, "run/journal": [CHECK, {"kind": "end", "merges": 1}]}


def changed(change):
    """A second side, which `change` has worked on."""
    other = copy.deepcopy(SIDE)
    change(other)
    return other


def statuses(other):
    return {row.name: row.status for row in compared(SIDE, other)}


def test_equal_sides_are_equal():
    assert statuses(copy.deepcopy(SIDE)) == {"run/factors": "equal", "run/journal": "equal"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda s: s["run/factors"].update(end="ce"), ".end: 'cd' -> 'ce'"),
        (lambda s: s["run/factors"].pop("2"), ".2 is gone"),
        (lambda s: s["run/factors"].update({"3": "ef"}), ".3 is new"),
        (lambda s: s["run/journal"][0]["modules"][1].update(cosine=0.26), "[0].modules[1].cosine: 0.25 -> 0.26"),
        (lambda s: s["run/journal"][0]["modules"][0].pop("cosine"), "[0].modules[0].cosine is gone"),
        (lambda s: s["run/journal"][1].update(merges=1.0), "[1].merges: 1 -> 1.0"),
        (lambda s: s["run/journal"].pop(), "it: 2 lines -> 1 lines"),
        (lambda s: s["run/journal"][0]["modules"].append({"name": "c"}), "[0].modules: 2 lines -> 3 lines"),
        (lambda s: s.pop("run/journal"), "only before"),
        (lambda s: s.update({"run/card": []}), "only after"),
    ],
)
def test_what_changes_or_goes_differs_and_is_named(change, where):
    rows = [row for row in compared(SIDE, changed(change)) if row.status != "equal"]
    assert [(row.status, row.where) for row in rows] == [("DIFFERS", where)]
    assert "1 DIFFERS" in table(rows)


def test_a_key_that_only_the_new_journal_has_is_added_and_told_once():
    def limits(side):
        for module in side["run/journal"][0]["modules"]:
            module["limit"] = 0.35

    rows = {row.name: row for row in compared(SIDE, changed(limits))}
    assert (rows["run/journal"].status, rows["run/journal"].where) == ("added", "[].modules[].limit")
    assert rows["run/factors"].status == "equal"


def test_clocks_are_left_out_and_nothing_else():
    entry = {"kind": "end", "time": "now", "seconds": 1.5, "measures": [{"value": 0.5, "seconds": 2}]}
    assert evidence.without_clocks(entry) == {"kind": "end", "measures": [{"value": 0.5}]}
    assert evidence.words("6 modules in 1.5 s, 0.8 left\n") == ["6 modules in ~, 0.8 left"]


def test_one_run_made_twice_is_equal_and_another_run_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = make_world()
    settings = training.knobs(**training.GATES["threshold"])
    sides = []
    for folder, more in {"one": {}, "two": {}, "three": {"weights": [0.81, 0.19]}}.items():
        found = training.guarded(world, folder, {**settings, **more}, max_steps=3)
        sides.append({name: found[name] for name in ("factors", "moments", "journal", "saved")})
    assert {row.status for row in compared(sides[0], sides[1])} == {"equal"}
    assert {row.status for row in compared(sides[0], sides[2])} == {"DIFFERS"}
    assert sides[0]["factors"].keys() == {"1", "2", "3", "end"}


def test_a_side_with_another_package_than_it_was_told_of_is_refused(tmp_path):
    """The package of a folder comes before the one that is installed, and a folder without one is found out."""
    package = tmp_path / "packages" / "safemerge_callback"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text("")
    told = os.environ | {"PYTHONPATH": os.pathsep.join([str(package.parent), str(command.ROOT)])}
    # The runs could import nothing from a package that is empty: only the check is asked.
    code = (
        "import sys, types; sys.modules['tests.trajectory.witness.runs'] = types.ModuleType('runs'); "
        "from tests.trajectory.witness.side import require_package; require_package(sys.argv[1])"
    )
    ends = {}
    for folder in (package.parent, tmp_path / "none"):
        words = [sys.executable, "-c", code, str(folder)]
        ends[folder.name] = subprocess.run(words, cwd=tmp_path, env=told, capture_output=True, text=True)
    assert [end.returncode for end in ends.values()] == [0, 1]
    assert f"is to run the package in {tmp_path / 'none'}, and imported {package}" in ends["none"].stderr
