"""`safemerge doctor` and `safemerge init`: what they print, write, refuse and end with."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.training import SafeMergeConfig


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_doctor_ends_with_1_where_something_is_wrong(world):
    lines = run("doctor").stdout.splitlines()
    assert lines[0].startswith("ok       python: 3.")
    assert any(line.startswith("ok       torch: ") for line in lines)
    # It has no tokenizer.
    document = json.loads(run("doctor", world.folder / "aligned", "--adapter", world.safety, "--json", code=1).stdout)
    assert document["ok"] is False
    states = {one["what"]: one["state"] for one in document["findings"]}
    assert (states["adapter on model"], states["chat template"]) == ("ok", "problem")


def test_init_writes_settings_and_says_what_to_run(tmp_path):
    result = run("init", "org/my chat".replace(" ", "-"))
    assert SafeMergeConfig.from_yaml("safemerge.yaml") == SafeMergeConfig(corrections=[{"replay": {}}])
    assert result.stderr == "safemerge.yaml: written\n"
    assert "build" not in result.stdout
    result = run("init", "org/chat", "--unaligned", "org/base", "--safety-adapter", "org/safety", "-o", "new/s.yaml")
    config = SafeMergeConfig.from_yaml("new/s.yaml")
    assert config == SafeMergeConfig("chat.subspace.safetensors", "org/safety")
    calls = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("safemerge ")]
    assert [words[1] for words in calls] == ["doctor", "build", "report", "gate"]
    assert calls[1][2:] == ["--aligned", "org/chat", "--unaligned", "org/base", "-o", "chat.subspace.safetensors"]
    # Its own file is replaced.
    run("init", "org/chat", "-o", "new/s.yaml")
    assert SafeMergeConfig.from_yaml("new/s.yaml").subspace is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["org/chat", "--safety-adapter", "org/safety"], "--safety-adapter is merged where drift is measured"),
        (["no such model"], "model 'no such model'"),
        (["org/chat", "-o", "mine.yaml"], "'mine.yaml' is there and is not a file of first settings"),
    ],
)
def test_what_init_refuses(tmp_path, arguments, words):
    (tmp_path / "mine.yaml").write_text("every: 3\n")
    assert words in run("init", *arguments, code=2).stderr
    assert (tmp_path / "mine.yaml").read_text() == "every: 3\n"
    assert not (tmp_path / "safemerge.yaml").exists()
