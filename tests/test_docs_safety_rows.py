"""The page on safety rows says what is so: its imports exist, its figures are the code's."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

from safemerge_callback import mix_safety_data
from safemerge_callback.cli.rows import select
from safemerge_callback.evaluation.harvest import LEAST_REFUSED, MOST_REFUSED, harvest
from safemerge_callback.evaluation.row_filter import MARGIN, gap_reasons
from safemerge_callback.evaluation.selection import POWER
from safemerge_callback.signals import row_format

PAGE = (Path(__file__).parents[1] / "docs" / "safety_rows.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())


def default(function, name):
    return inspect.signature(function).parameters[name].default


def test_the_python_imports_what_exists_and_calls_with_what_is_taken():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(import_module(node.module), alias.name) for alias in node.names)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.keywords:
                assert node.func.id == "mix_safety_data"
                assert {k.arg for k in node.keywords} <= set(inspect.signature(mix_safety_data).parameters)
    for name, module in (("row_tokens", "signals.rows"), ("format_of", "signals.row_format")):
        assert hasattr(import_module(f"safemerge_callback.{module}"), name)
        assert f"{name}(" in TEXT


def test_the_margin_of_the_filter_is_one():
    assert default(select, "margin") == default(gap_reasons, "margin") == MARGIN
    assert f"by more than `--margin` nats a token ({MARGIN:g})" in TEXT


def test_the_figures_are_the_codes():
    assert f"the first {default(harvest, 'max_new_tokens')} tokens of a response" in TEXT
    assert f"fewer than {100 * LEAST_REFUSED:g} % of the harmful prompts refused" in TEXT
    assert "more than half of the harmless ones refused" in TEXT
    assert MOST_REFUSED == 0.5
    assert f"the first {row_format._FIRST} rows of a training set" in TEXT
    assert f"`--share` ({default(select, 'share')})" in TEXT
    assert f"(power {POWER:g})" in TEXT
    assert default(select, "power") == POWER
    assert f"{default(select, 'limit'):,} rows of the data at most (`--limit`)" in TEXT
