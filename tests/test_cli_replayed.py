"""The command line on the folder of a run without a subspace: what it shows, and what it says is missing."""

import re
import shutil

import pytest
from typer.testing import CliRunner

from safemerge_callback.cli import app


@pytest.fixture
def folder(replayed, tmp_path):
    return shutil.copytree(replayed, tmp_path / "run")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    assert result.exit_code == code, result.output
    return result


def test_report_and_watch_show_it(folder, runs):
    shown = run("report", folder).stdout
    (end,) = runs.entries(folder, "end")
    assert shown.startswith(f"run: no check; {end['seconds']:.1f} s in all, ")
    assert "replay: in 12 steps, 24 rows until step 12, weight 2, interval 1; " in shown
    assert shown.endswith("safemerge_report.html: replay\n")
    assert (folder / "safemerge_report.html").read_text().count('id="losses"') == 1
    for plot in ([], ["--plot", "losses"]):
        run("report", folder, "-o", folder / "x.svg", *plot)
        assert "replay: loss" in (folder / "x.svg").read_text()
    refused = run("report", folder, "-o", folder / "y.svg", "--plot", "moved", code=2)
    assert "plot='moved': nothing was checked in this run; choose losses." in refused.stderr
    assert "replay until step 12: in 12 steps, 24 rows" in run("watch", folder, "--once").stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["undo", "{run}"], "had no subspace, so it merged nothing and there is no merge to take back"),
        (["measure", "{run}", "-s", "{subspace}"], "has no adapter_config.json and no adapter_model.safetensors"),
        (["merge", "{run}", "-o", "{run}/out"], "subspace not given: name them .* makes a subspace"),
        (["merge", "{run}", "-s", "{subspace}", "-o", "{run}/out"], "has no adapter_config.json"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(world, folder, arguments, says):
    before = sorted(folder.rglob("*"))
    words = [word.format(run=folder, subspace=world.subspace) for word in arguments]
    result = run(*words, code=2)
    assert result.stderr.startswith("safemerge: ")
    assert result.stderr.count("\n") == 1
    assert re.search(says, result.stderr), result.stderr
    assert sorted(folder.rglob("*")) == before
