"""The README tells the truth: its tables are the code's, its Python runs as far as it can without a model."""

import ast
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

import safemerge_callback
from safemerge_callback import SafeMergeCallback, SafeMergeConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_in_three_minutes():
    assert len(README.split()) <= 700


def test_every_setting_is_on_its_page():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    body = text.split("| setting | default | what it is |", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if "`" in line]
    shown = {cells[0].strip("`"): cells[-1] for cells in rows}
    assert shown == {f.name: f.metadata["help"] for f in dataclasses.fields(SafeMergeConfig)}


def test_the_settings_that_matter_are_settings():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ", README, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(rows) == 6
    assert set(names) <= {f.name for f in dataclasses.fields(SafeMergeConfig)}


def test_every_page_is_on_a_shelf():
    shelves = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page for folder in ("docs", "docs/integrations", "docs/wandb") for page in (ROOT / folder).glob("*.md")]
    paths = {page.relative_to(ROOT / "docs").as_posix() for page in pages} - {"README.md"}
    linked = set(re.findall(r"\]\(([^)]+\.md)\)", shelves))
    assert paths <= linked
    assert [link for link in linked if not (ROOT / "docs" / link).exists()] == []


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
