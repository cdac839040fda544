"""The notebooks: one is run and asserts what it says, both can be read, import what exists and call what is taken."""

import ast
import inspect
import json
import warnings
from importlib import import_module

import pytest

from tests.support.notebooks import FOLDER, PATHS, cells, code, run

NAMES = [path.stem for path in PATHS]
OURS = ("SafeMergeCallback", "SafetyEvalCallback")
each = pytest.mark.parametrize("path", PATHS, ids=NAMES)


def trees(path):
    return [ast.parse(text, filename=name) for name, text in code(path)]


def imported(path):
    """What the imports of a notebook give, by name; an AttributeError where there is no such thing."""
    given = {}
    for tree in trees(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = import_module(node.module)
                given |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                given |= {alias.asname or alias.name: import_module(alias.name) for alias in node.names}
    return given


def calls(path):
    nodes = [node for tree in trees(path) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(node.func.id, node) for node in nodes if isinstance(node.func, ast.Name)]


def test_the_notebooks_are_these():
    assert NAMES == ["guard_a_finetune", "guard_an_llm_on_a_gpu"]


@each
def test_a_notebook_holds_no_output_and_begins_with_what_it_is(path):
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    assert [cell for cell in cells(path) if cell["outputs"] or cell["execution_count"] is not None] == []
    assert "".join(whole["cells"][0]["source"]).startswith("# Guard a ")
    assert whole["metadata"]["kernelspec"]["name"] == "python3"


@each
def test_a_notebook_imports_what_exists_and_calls_it_with_what_is_taken(path):
    there = imported(path)
    checked = [(name, node) for name, node in calls(path) if name in there and callable(there[name])]
    assert len(checked) > 8
    for name, node in checked:
        parameters = inspect.signature(there[name]).parameters
        if any(one.kind is one.VAR_KEYWORD for one in parameters.values()) and name not in OURS:
            continue
        allowed = set(parameters) | (set(settings_of(name)) if name in OURS else set())
        assert {word.arg for word in node.keywords} <= allowed, name


def settings_of(name):
    from dataclasses import fields

    from safemerge_callback import SafeMergeConfig

    return [one.name for one in fields(SafeMergeConfig)] if name == "SafeMergeCallback" else []


def test_the_settings_of_the_gpus_notebook_make_callbacks():
    path = FOLDER / "guard_an_llm_on_a_gpu.ipynb"
    there = imported(path)
    made = [
        there[name](**{word.arg: ast.literal_eval(word.value) for word in node.keywords})
        for name, node in calls(path)
        if name in OURS
    ]
    assert [type(one).__name__ for one in made] == ["SafeMergeCallback", "SafetyEvalCallback", "SafeMergeCallback"]
    alone, _, pulling = made
    assert [one.kind.name for one in alone.config.chosen_corrections] == ["replay"]
    assert [one.kind.name for one in pulling.config.chosen_corrections] == ["replay"]
    assert (alone.config.measures, pulling.config.measures) == (False, True)


@each
def test_the_pages_that_a_notebook_names_exist(path):
    text = "".join(line for cell in cells(path, "markdown") for line in cell["source"])
    named = [word for word in text.replace("`", " ").split() if word.startswith("docs/") or word.endswith(".ipynb")]
    assert len(named) >= 2
    assert [name for name in named if not ((FOLDER.parent / name).is_file() or (FOLDER / name).is_file())] == []


@pytest.mark.slow
def test_the_notebook_on_a_cpu_runs_and_what_it_asserts_holds(tmp_path, monkeypatch, capsys):
    import torch

    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with warnings.catch_warnings():
        # peft and trl read names that transformers 5.23 renamed
        warnings.simplefilter("ignore", FutureWarning)
        names = run(FOLDER / "guard_a_finetune.ipynb")
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.endswith("both claims hold\n")
    # They could fail: the plain training is the one that forgets.
    assert names["without"]["as before"]["value"] < 0.5 < names["held"]["as before"]["value"]
