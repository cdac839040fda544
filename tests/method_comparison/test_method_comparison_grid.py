"""A grid's file that takes in another."""

import pytest
import yaml

from method_comparison.grid import load_grid
from safemerge_callback.errors import ConfigError

UNDER = {
    "output_dir": "runs/under",
    "model": "org/aligned",
    "unaligned": "org/unaligned",
    "target_modules": ["q_proj"],
    "seeds": [1, 2],
    "tasks": ["sentiment"],
    "finetune": {"bf16": True, "max_steps": 60},
    "evaluate": {"dtype": "bfloat16", "task": 400},
    "arms": {"plain": {"about": "plain"}, "other": {"about": "other", "settings": {"learning_rate": 1e-4}}},
}


@pytest.fixture
def under(tmp_path):
    (tmp_path / "under.yaml").write_text(yaml.safe_dump(UNDER, sort_keys=False))
    return tmp_path


def over(folder, **raw):
    path = folder / "over.yaml"
    path.write_text(yaml.safe_dump({"base": "under.yaml", **raw}))
    return path


def test_what_a_grid_says_goes_before_its_base_key_by_key(under):
    grid = load_grid(over(under, output_dir="runs/over", seeds=[3], finetune={"bf16": False}, evaluate={"task": 8}))
    assert (grid.output_dir, grid.seeds, grid.tasks) == ("runs/over", [3], ["sentiment"])
    assert grid.finetune == {"bf16": False, "max_steps": 60}
    assert (grid.evaluate["dtype"], grid.evaluate["task"]) == ("bfloat16", 8)
    assert list(grid.arms) == ["plain", "other"]


def test_a_grid_that_says_nothing_else_is_its_base(under):
    assert load_grid(over(under)) == load_grid(under / "under.yaml")


def test_arms_are_added_and_replaced_whole(under):
    grid = load_grid(over(under, arms={"other": {"about": "another"}, "third": {"about": "third"}}))
    assert {name: arm.about for name, arm in grid.arms.items()} == {
        "plain": "plain",
        "other": "another",
        "third": "third",
    }
    assert "learning_rate" not in grid.arms["other"].settings


@pytest.mark.parametrize(
    ("base", "match"),
    [
        ("absent.yaml", "absent.yaml.*cannot be read"),
        ("../absent.yaml", "absent.yaml.*cannot be read"),
        ("", "cannot be read"),
        ("over.yaml", "'over.yaml': name a grid that has none itself"),
        (["under.yaml"], "name a grid"),
        (False, "name a grid"),
    ],
)
def test_a_base_that_is_none_is_refused(under, base, match):
    with pytest.raises(ConfigError, match=match):
        load_grid(over(under, base=base))


def test_a_mistyped_key_over_a_base_is_refused(under):
    with pytest.raises(ConfigError, match="'fintune' is unknown"):
        load_grid(over(under, fintune={"bf16": False}))
