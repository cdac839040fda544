"""The page on actions: its settings are settings, its names of methods are those that the registry has."""

import re
from pathlib import Path

import pytest
import yaml

from safemerge_callback.methods import METHODS
from safemerge_callback.training import SafeMergeConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "actions.md").read_text(encoding="utf-8")
ROWS = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ") and "`: " not in line[:4]]
ACTIONS = {row[0].strip(): row[1] for row in ROWS if re.search(r"`(method|gate): ", row[1])}


def settings(cell):
    return dict(pair for text in re.findall(r"`(\w+: [^`]+)`", cell) for pair in yaml.safe_load(text).items())


@pytest.mark.parametrize("action", ACTIONS)
def test_the_settings_of_every_action_make_a_config(action):
    SafeMergeConfig(**{"subspace": "s", "safety_adapter": "a", **settings(ACTIONS[action])})


def test_there_are_these_actions():
    assert {action.partition(",")[0] for action in ACTIONS} == {
        "merge",
        "project",
        "pull",
        "regress",
        "prune",
        "average",
        "watch",
    }


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_the_yaml_is_accepted(block):
    config = SafeMergeConfig.from_dict({"subspace": "s", **yaml.safe_load(block)})
    assert len(config.weights) == 1 + len(config.adapters)


def test_the_methods_that_take_an_update_away_are_named():
    sentence = re.search(r"where updates are summed: (.*?)\.", PAGE, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", sentence)) == {name for name, method in METHODS.items() if method.signed}


def test_the_files_that_it_names_exist():
    assert [path for path in re.findall(r"configs/[\w/]+\.yaml", PAGE) if not (ROOT / path).exists()] == []
