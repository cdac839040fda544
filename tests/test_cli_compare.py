"""`safemerge compare`: files, runs, forms and exit codes."""

import json

import pytest
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.evaluation.figures_file import figure_rows
from safemerge_callback.evaluation.measure import share_of
from safemerge_callback.evaluation.probe import Answers
from safemerge_callback.record.entries import probe_entry

FEW, MANY = "1" * 20 + "0" * 20, "1" * 34 + "0" * 6


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, letters in (("plain", FEW), ("guarded", MANY)):
        figures = [share_of("bad_refused", letters, "harm", judge="keywords", prompts="p")]
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": {}, "figures": figure_rows(figures)}))
    return tmp_path


def compare(*words, code=0):
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_of(folder, name, letters, judge="keywords"):
    shares = [share_of("bad_refused", one, "harm", prompts="p") for one in (FEW, letters)]
    settings = {"judge": judge, "benign_judge": judge, "max_new_tokens": 24}
    lines = [
        probe_entry(step, when, Answers((share,), 5.0, 1.0), settings if step == 0 else None)
        for (step, when), share in zip([(0, "begin"), (8, "end")], shares, strict=True)
    ]
    journal = folder / name / "safemerge.jsonl"
    journal.parent.mkdir()
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_answer_stands_in_the_first_line():
    first, *rest = compare("plain.json", "guarded.json").stdout.splitlines()
    assert first == (
        "did the second help? yes; better: bad_refused +35.0 points (+18.5 to +49.1); nothing is seen to be worse"
    )
    table = "\n".join(rest)
    assert "better" in table
    assert "prompts" in table
    assert compare("guarded.json", "plain.json").stdout.startswith("did the second help? no, it did harm; worse: bad_")
    assert "that cannot be told" in compare("plain.json", "plain.json").stdout


def test_runs_are_compared_by_their_last_probes(folder):
    run_of(folder, "without", FEW)
    run_of(folder, "with", MANY)
    found = json.loads(compare("without", "with", "--json").stdout)
    assert (found["outcome"], found["first"], found["second"]) == ("better", "without, step 8", "with, step 8")
    assert [(one["measure"], one["paired"]) for one in found["contrasts"]] == [
        ("bad_refused", True),
        ("coherence", True),
    ]
    # A run and a file go together, too.
    compare("plain.json", folder / "with" / "safemerge.jsonl")
    run_of(folder, "another", MANY, judge="llamaguard")
    assert "judged by keywords and by llamaguard" in compare("without", "another", code=4).stdout


def test_what_gate_writes_is_read(folder):
    gate = ["gate", "--figures", "guarded.json", "--min-refused", "0.5", "--json"]
    (folder / "gate.json").write_text(CliRunner().invoke(app, gate).stdout)
    found = json.loads(compare("plain.json", "gate.json", "--json").stdout)
    assert found["contrasts"][0]["paired"]


def test_markdown_is_a_section_of_its_own():
    lines = compare("plain.json", "guarded.json", "--markdown").stdout.splitlines()
    assert lines[0].startswith("### did the second help? yes")
    assert [line for line in lines if line.startswith("| better | bad\\_refused |")]


def test_exit_codes(folder):
    compare("plain.json", code=2)
    assert "absent.json" in compare("plain.json", "absent.json", code=3).stderr
    (folder / "empty").mkdir()
    assert "safemerge.jsonl" in compare("plain.json", "empty", code=3).stderr
    (folder / "none.json").write_text('{"figures": []}')
    found = json.loads(compare("plain.json", "none.json", "--json", code=4).stdout)
    assert (found["outcome"], found["exit_code"]) == ("not_measured", 4)
