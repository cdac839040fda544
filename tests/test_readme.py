"""The README tells the truth: its tables are the code's, its Python runs as far as it can without a model."""

import ast
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

import safemerge_callback
from safemerge_callback import SafeMergeCallback, SafeMergeConfig
from safemerge_callback.record.metrics import METRICS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(heading):
    """First cell -> last cell of the rows below a table's header."""
    body = README.split(heading, 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if "`" in line]
    return {cells[0].strip("`"): cells[-1] for cells in rows}


def test_the_keys_in_the_metrics_table_are_logged_and_mean_that():
    # All of them are on docs/metrics.md, which tests/record/test_record_metrics.py holds to the code.
    shown = table("| key | meaning |")
    assert shown.items() <= METRICS.items()
    assert len(shown) >= 5


def test_every_setting_is_in_the_settings_table():
    settings = {f.name: f.metadata["help"] for f in dataclasses.fields(SafeMergeConfig)}
    assert table("| setting | default | what it is |") == settings


def made_by(code):
    """The callbacks that a block of code makes."""
    calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    ours = [call for call in calls if ast.unparse(call.func) == "SafeMergeCallback"]
    return [SafeMergeCallback(**{k.arg: ast.literal_eval(k.value) for k in call.keywords}) for call in ours]


def test_the_first_lines_make_callbacks():
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    (alone,), (merging,) = made_by(first), made_by(second)
    assert [one.kind.name for one in alone.config.chosen_corrections] == ["replay"]
    assert not alone.config.measures
    assert merging.config.safety_adapter == "my-org/safety-lora"
    assert len([line for line in first.splitlines() if line]) == 3


def test_the_python_imports_what_exists():
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "safemerge_callback":
                assert [a.name for a in node.names if not hasattr(safemerge_callback, a.name)] == []


@pytest.mark.parametrize("command", ["demo", "test"])
def test_the_two_commands_are_targets(command):
    assert f"\nmake {command}\n" in README
    assert f"\n{command}: " in (ROOT / "Makefile").read_text()


def test_links_and_extras_and_paths_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    paths = re.findall(r"(?:recipes|configs|method_comparison)/[\w/]+\.(?:py|yaml)", README)
    assert [p for p in links + paths if not (ROOT / p).exists()] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.search(r'pip install "\.\[([^\]]+)\]"', README)[1].split(",")
    assert set(named) <= set(extras)
