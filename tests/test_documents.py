"""What is read from YAML and JSON: as the libraries read it, but for a key that is given twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.comparison.grid import load_grid
from recipes.finetune import parse_finetune
from safemerge_callback import SafeMergeConfig
from safemerge_callback.documents import parse_json, parse_yaml, read_json, read_yaml
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.prompts.tables import read_rows
from safemerge_callback.integrations.ms_swift import config_of
from safemerge_callback.offline.recipe import read_recipe

ROOT = Path(__file__).parents[1]
TWICE = "method: linear\nevery: 10\nmethod: ties\n"


def _ms_swift(path: Path) -> Any:
    return config_of({"SAFEMERGE_SUBSPACE": "s", "SAFEMERGE_MODULE_WEIGHTS": '{"v_proj": [1, 0], "v_proj": [0, 1]}'})


READERS: dict[str, Callable[[Path], Any]] = {
    "callback": SafeMergeConfig.from_yaml,
    "merge --config": read_recipe,
    "grid": load_grid,
    "recipe": lambda path: parse_finetune(["--config", str(path)]),
    "prompts": lambda path: read_rows(path.rename(path.with_suffix(".prompt"))),
    "ms-swift": _ms_swift,
    "module_weights": lambda _: SafeMergeConfig("s", "a", module_weights='{"q": [1.0, 0.1], "q": [0.9, 0.1]}'),
}


@pytest.mark.parametrize("who", READERS)
def test_every_reader_refuses_a_key_given_twice(tmp_path: Path, who: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(TWICE)
    with pytest.raises(ConfigError, match="gives the key") as refused:
        READERS[who](path)
    assert "twice" in str(refused.value)
    assert "cannot be read" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (TWICE, "'method' twice, in lines 1 and 3"),
        ("a:\n- {b: 1, c: 2, b: 3}\n", "'b' twice, in lines 2 and 2"),
        ("1: a\n1.0: b\n", "twice, in lines 1 and 2"),
        ("on: a\nyes: b\n", "True twice, in lines 1 and 2"),
        ("x: &x {<<: {a: 1}, a: 2}\ny: {<<: *x, a: 3, a: 4}\n", "'a' twice, in lines 2 and 2"),
    ],
)
def test_a_yaml_key_given_twice_is_named_with_its_lines(text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=f"^the file gives the key .*{where}"):
        parse_yaml(text, "the file")


def test_all_else_is_as_the_libraries_read_it(tmp_path: Path) -> None:
    """Merge keys that are overridden, several of them, nested anchors, and every YAML of this repository."""
    texts = [
        "t: {deep: {x: &x {<<: &y {a: 1, b: 2}, a: 3}}}\nb: {<<: *x, a: 4}\nc: {<<: [*x, *y], z: 1}\n",
        "a: &a {k: 1}\nb: &b {l: 2}\nc:\n  <<: *a\n  <<: *b\n  k: 5\n",
        "",
        *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").rglob("*.yaml"))),
    ]
    for text in texts:
        assert parse_yaml(text, "it") == yaml.safe_load(text)
    file = tmp_path / "x"
    file.write_text(json.dumps({"a": [{"b": 1}, {"b": 2}]}))
    assert read_json(file, "it") == read_yaml(file, "it") == {"a": [{"b": 1}, {"b": 2}]}
    with pytest.raises(ConfigError, match="it gives the key 'b' twice"):
        parse_json('{"a": {"b": 1, "b": 1}}', "it")


def test_yaml_runs_nothing() -> None:
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        parse_yaml("a: !!python/object/apply:os.getcwd []", "it")
