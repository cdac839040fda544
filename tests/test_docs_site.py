"""The pages as a whole: navigation, links, anchors, the words that they quote. None of it needs mkdocs."""

import ast
import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import safemerge_callback
from safemerge_callback.decision import GATES, KNOB, MergePlan, Reading, Readings
from safemerge_callback.evaluation.judges import load_judge
from safemerge_callback.methods import METHODS
from safemerge_callback.ops import LowRank

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = runpy.run_path(str(DOCS / "theme" / "pages.py"))
PAGES = sorted(DOCS.rglob("*.md"))
BESIDE = [
    ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT", "AGENTS")
]
TEXTS = {page: page.read_text(encoding="utf-8") for page in (*PAGES, *BESIDE)}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def leaves(navigation):
    """The paths of a navigation, as the site has them."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [path for part in parts for path in leaves(part)]


def fences(page, language):
    """What stands in the fences of a language on a page of docs/."""
    return [code for name, code in FENCE.findall(TEXTS[DOCS / page]) if name == language]


def anchors(text):
    """The headings of a page as links spell them, on GitHub and on the site."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation_once():
    navigation = SITE["navigation"]()
    assert [next(iter(shelf)) for shelf in navigation] == ["Documentation", "Start", "Guides", "Reference", "Evidence"]
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES]
    pages += [path for path in SITE["outside"](pages) if path.endswith(".md")]
    assert sorted(leaves(navigation)) == sorted(map(SITE["site_path"], pages))


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_anchors_to_headings(page):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", FENCE.sub("", TEXTS[page]))):
        if re.match(r"\w+:", target):
            continue
        link, _, anchor = target.partition("#")
        place = (page.parent / link).resolve() if link else page
        if not place.is_file() or (anchor and anchor not in anchors(place.read_text(encoding="utf-8"))):
            lost.append(target)
    assert lost == []


def test_a_link_out_of_docs_leads_to_where_the_site_has_the_file():
    lead = SITE["for_the_site"]
    assert (
        lead("docs/README.md", "[a](../CONTRIBUTING.md#b) [c](gates.md)")
        == "[a](repository/CONTRIBUTING.md#b) [c](gates.md)"
    )
    assert lead("docs/methods/pull.md", "[a](../../Makefile)") == "[a](../repository/Makefile)"
    assert (
        lead("CONTRIBUTING.md", "[a](docs/gates.md) ![](docs/images/drift.png)")
        == "[a](../gates.md) ![](../images/drift.png)"
    )
    untouched = "[a](https://b.org/c.md) [d](#e) [f](missing.md) `x[i](j)`"
    assert lead("docs/README.md", untouched) == untouched


def test_a_page_says_first_for_whom_it_is():
    # The rest of the evidence is written by programs, and the findings say what they answer.
    evidence = re.compile(r"README|findings|drift|results\w*")
    pages = [page for page in PAGES if page.parent.name != "methods" and not evidence.fullmatch(page.stem)]
    assert len(pages) > 40
    assert [page.stem for page in pages if not re.match(r"# .*\n\nFor who", TEXTS[page])] == []


def literals():
    """Every text of the package's code, with a gap for each value that stands in it."""
    for path in sorted((ROOT / "safemerge_callback").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "\0".join(part.value if isinstance(part, ast.Constant) else "" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_of_troubleshooting_are_the_codes_own():
    quoted = [line for block in fences("troubleshooting.md", "text") for line in block.splitlines()]
    assert len(quoted) > 12
    texts = list(literals())
    said = {line: re.compile(".*".join(map(re.escape, line.split("..."))), re.DOTALL) for line in quoted}
    assert [line for line, words in said.items() if not any(words.search(text) for text in texts)] == []


def test_the_journal_lines_of_how_it_works_stand_in_a_journal():
    quoted = fences("how_it_works.md", "json")
    lines = (ROOT / "tests" / "record" / "journals" / "v2.jsonl").read_text(encoding="utf-8").splitlines()
    modules = [module for line in lines for module in json.loads(line).get("modules", ()) if isinstance(module, dict)]
    assert len(quoted) == 2
    assert [line for line in quoted if json.loads(line) not in modules] == []


def test_the_page_of_public_names_has_each_once():
    named = re.findall(r"^::: safemerge_callback\.(\w+)$", TEXTS[DOCS / "api.md"], re.MULTILINE)
    assert sorted(named) == sorted(set(safemerge_callback.__all__) - {"__version__"})


def test_the_sites_tools_are_pinned_at_versions_that_the_extra_allows():
    lines = (ROOT / "requirements" / "docs.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    assert [r for r in map(Requirement, extra) if pins[r.name] not in r.specifier] == []


@pytest.fixture
def blocks():
    """The Python of docs/extending.md, run; the registries are as they were afterwards."""
    registries = [(registry, dict(registry)) for registry in (GATES, KNOB, METHODS)]
    names = {}
    for code in fences("extending.md", "python"):
        exec(compile(code, "docs/extending.md", "exec"), names)
    yield names
    for registry, before in registries:
        registry.clear()
        registry.update(before)


def test_what_the_page_on_extending_adds_is_used(blocks):
    readings = Readings(Reading(name, 0.5, 0.4, 1.0, 2, (8, 8)) for name in ("layers.0.q_proj", "layers.0.v_proj"))
    plan = MergePlan.decide(readings, gate="values_only", method="safety_first", weights=(0.5, 0.5))
    assert plan.selected == ("layers.0.v_proj",)
    live, safety = (LowRank(torch.randn(1, 2, 8), torch.randn(1, 8, 2)) for _ in range(2))
    merged = METHODS["safety_first"].function(live, [safety], weights=(0.5, 0.5))
    wanted = METHODS["linear"].function(live, [safety], weights=(0.25, 0.5))
    assert torch.equal(merged.B @ merged.A, wanted.B @ wanted.A)
    judge = load_judge(blocks["refuses_in_latin"])
    assert judge.refuses("?", "Non possum.")
    assert not judge.refuses("?", "Possum.")
