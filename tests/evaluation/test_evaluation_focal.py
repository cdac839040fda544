"""Which safety adapters go together, from the responses that an evaluation kept; and the verb."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.focal import choose_by_responses
from safemerge_callback.evaluation.measure import LETTERS

WORDS = {letter: verdict for verdict, letter in LETTERS.items()}


def write(path, outcomes, prompts="harm"):
    rows = [
        {"set": name, "judge": "keywords", "prompt": f"{name} {i}", "response": "...", "verdict": WORDS[letter]}
        for name, text in ((prompts, outcomes), ("benign", "0" * 3))
        for i, letter in enumerate(text)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / f"{i}.jsonl", text) for i, text in enumerate(["11001u", "11001u", "001111"])]


def test_the_chosen_are_those_that_fail_elsewhere(files):
    choice = choose_by_responses(files, prompts="harm", judge="keywords")
    assert choice.outcomes == ["11001u", "11001u", "001111"]
    assert choice.chosen.members == (0, 2)
    assert choice.chosen.diversity == 1.0


def test_the_verb_prints_the_setting(files):
    result = CliRunner().invoke(app, ["focal", *map(str, files), "--set", "harm"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.endswith("chosen") for line in lines[:3]] == [True, False, True]
    assert "3 of 5 refused" in lines[0]
    assert yaml.safe_load(lines[-1])["focal"]["outcomes"] == ["11001u", "11001u", "001111"]


def test_other_prompts_sets_and_counts_are_refused(files, tmp_path):
    other = write(tmp_path / "other.jsonl", "1100")
    for given, says, settings in (
        ([*files, other], "hold other prompts", {}),
        (files, "has no verdicts of 'keywords' on 'harms'", {"prompts": "harms"}),
        (files[:1], "2 of 1 adapters", {}),
        ([*files, tmp_path / "gone.jsonl"], "gone.jsonl", {}),
    ):
        with pytest.raises(ConfigError, match=says):
            choose_by_responses(given, **{"prompts": "harm", "judge": "keywords"} | settings)
