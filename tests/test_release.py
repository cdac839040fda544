"""What a release is made of: one version, workflows that name what exists, forms that ask for what helps."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from safemerge_callback import __version__

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = {path.stem: path for path in sorted((GITHUB / "workflows").glob("*.yml"))}
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
WRITTEN = [path for path in sorted(GITHUB.rglob("*")) if path.is_file()]
WRITTEN += [ROOT / name for name in (".pre-commit-config.yaml", "AGENTS.md", "CODE_OF_CONDUCT.md", "SECURITY.md")]


def workflow(name):
    """A workflow as it is read, where YAML takes the key `on` for true."""
    return yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))


def steps(name):
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


# the version


def test_the_version_stands_in_one_place_and_is_repeated_in_one():
    assert PROJECT["project"]["dynamic"] == ["version"]
    place = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert place == "safemerge_callback.version.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_a_version_that_is_released_has_its_date_and_one_that_is_not_has_none():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert [h for h in headings[1:] if not re.fullmatch(r"\[\d+\.\d+\.\d+\] - 20\d\d-\d\d-\d\d", h)] == []
    kinds = re.findall(r"^### (.*)$", changes.split("\n## ")[1], re.MULTILINE)
    assert kinds[:3] == ["Added", "Changed", "Fixed"]
    assert "date-released" not in yaml.safe_load((ROOT / "CITATION.cff").read_text()) or len(headings) > 1


def test_the_tools_of_the_archives_are_pinned_with_a_build_backend_that_the_project_allows():
    lines = (ROOT / "requirements" / "dist.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"build", "twine", "setuptools"} <= set(pins)
    backends = map(Requirement, PROJECT["build-system"]["requires"])
    assert [one for one in backends if pins[one.name] not in one.specifier] == []


# the workflows


def test_the_workflows_are_these():
    assert sorted(WORKFLOWS) == ["checks", "publish", "weekly"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_targets_and_files_that_exist(name):
    commands = " ; ".join(step["run"] for step in steps(name) if "run" in step)
    targets = {word for words in re.findall(r"\bmake((?: [a-z][\w-]*(?!=))+)", commands) for word in words.split()}
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    assert targets
    assert targets <= phony
    files = re.findall(r"(?:tests|requirements|safemerge_callback|recipes)/[\w/]+\.\w+|\b[A-Z]+\.md\b", commands)
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_target_of_the_makefile_is_declared():
    declared = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    assert declared == set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_an_action_is_pinned_by_its_major_version_and_a_job_ends_by_itself(name):
    used = [step["uses"] for step in steps(name) if "uses" in step]
    assert used
    assert [one for one in used if not re.fullmatch(r"(actions|pypa)/[\w-]+@(release/)?v\d+", one)] == []
    assert all(job["timeout-minutes"] <= 120 for job in workflow(name)["jobs"].values())


def test_a_workflow_may_read_and_only_the_one_that_publishes_may_say_who_it_is():
    assert all(workflow(name)["permissions"] == {"contents": "read"} for name in WORKFLOWS)
    more = {(name, job): of["permissions"] for name in WORKFLOWS for job, of in jobs(name) if "permissions" in of}
    assert more == {("publish", "publish"): {"id-token": "write"}}
    publish = workflow("publish")["jobs"]["publish"]
    assert publish["environment"] == "release"
    assert [step["uses"].partition("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    assert workflow("publish")[True] == {"push": {"tags": ["v*"]}}


def jobs(name):
    return workflow(name)["jobs"].items()


def test_the_pythons_are_those_that_the_project_allows_from_the_lowest_on():
    tested = workflow("checks")["jobs"]["test"]["strategy"]["matrix"]["python"]
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    assert tested == ["3.11", "3.12", "3.13"]
    assert all(version in allowed for version in tested)
    assert "3.10" not in allowed
    others = [s["with"]["python-version"] for n in WORKFLOWS for s in steps(n) if "python-version" in s.get("with", {})]
    assert set(others) == {tested[0], "${{ matrix.python }}"}
    assert f"PYTHON ?= python{tested[0]}\n" in MAKEFILE
    named = {c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if "Python :: 3." in c}
    assert named <= set(tested)


def test_the_weekly_run_is_against_three_libraries_that_the_package_or_its_recipes_need():
    libraries = workflow("weekly")["jobs"]["newest"]["strategy"]["matrix"]["library"]
    needed = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["recipes"]]
    assert set(libraries) == {"transformers", "trl", "peft"} <= {Requirement(one).name for one in needed}
    assert "schedule" in workflow("weekly")[True]


# hooks before a commit, forms, pages


def test_the_hooks_are_tools_of_the_environment_and_tests_that_exist():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repo["repo"] == "local"
    commands = [hook["entry"].split() for hook in repo["hooks"]]
    development = {Requirement(one).name for one in PROJECT["project"]["optional-dependencies"]["dev"]}
    tools = {Path(words[0]).name for words in commands}
    assert tools <= {"ruff", "lint-imports", "python"}
    assert {"ruff", "import-linter", "pytest"} <= development
    files = [word for words in commands for word in words if word.endswith(".py")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_something_and_names_commands_that_exist(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
    text = path.read_text(encoding="utf-8")
    public = (ROOT / "tests" / "public_api.txt").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^safemerge (\w+)", public, re.MULTILINE))
    assert set(re.findall(r"`safemerge (\w+)", text)) <= verbs


@pytest.mark.parametrize("stem", ["fault", "question"])
def test_the_forms_on_a_run_ask_for_the_version_and_the_journals_start_line(stem):
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{stem}.yml").read_text(encoding="utf-8"))
    labels = {field.get("id"): field["attributes"].get("label") for field in form["body"]}
    assert labels["version"] == "`safemerge --version`"
    assert "`start` line" in labels["start"]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_names_a_machine_or_an_index(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(^|[\s\"'(])/(home|root|work|mnt|Users)/|pypi\.(org|python)|pythonhosted|whl/cpu", text)
    assert [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 180] == []


def test_the_pages_name_files_that_exist():
    pages = [path for path in WRITTEN if path.suffix == ".md"]
    named = {
        (p.name, f) for p in pages for f in re.findall(r"\b(?:tests|docs)/[\w/.]*\w|\b[A-Z_]+\.md\b", p.read_text())
    }
    assert len(named) > 8
    assert [one for one in named if not (ROOT / one[1]).exists()] == []
    modules = {module for page in pages for module in re.findall(r"python -m (tests[\w.]+)", page.read_text())}
    assert modules
    places = [ROOT / module.replace(".", "/") for module in modules]
    assert [p for p in places if not (p.with_suffix(".py").is_file() or (p / "__main__.py").is_file())] == []
