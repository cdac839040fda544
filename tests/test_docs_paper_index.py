"""The paper index names what there is, and leaves out nothing that a registry takes from a paper."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from safemerge_callback.cli import app
from tests.test_registries import REGISTRIES

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "paper_index.md"
PAGES = (INDEX, ROOT / "docs" / "threat_model.md", ROOT / "docs" / "entities.md")
PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")
# Judges and trackers are in tables of their own.
INDEXED = ("methods", "gates", "weights", "corrections", "losses", "objectives", "minimisers")


def rows(text: str) -> list[tuple[set[str], set[str]]]:
    """Of each row of the page's tables: the papers, and the words in code."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [(set(PAPER.findall(line)), set(re.findall(r"`(\w+)`", line))) for line in lines]


def sources() -> Iterator[tuple[str, str, set[str]]]:
    """Registry, name and papers of every entry whose own file names a paper."""
    for registry in INDEXED:
        found = REGISTRIES[registry]
        for name in found.names:
            path = ROOT / found.folder / f"{name}.py"
            if papers := set(PAPER.findall(path.read_text(encoding="utf-8"))):
                yield registry, name, papers


def forgotten(text: str) -> list[str]:
    """The entries that no row of the page names beside a paper of theirs."""
    table = rows(text)
    return [
        f"{registry}: {name} ({', '.join(sorted(papers))})"
        for registry, name, papers in sources()
        if not any(papers & there and name in words for there, words in table)
    ]


def test_every_entry_of_a_registry_with_a_paper_is_in_the_index():
    assert len(list(sources())) > 20
    assert forgotten(INDEX.read_text(encoding="utf-8")) == []


def test_what_is_forgotten_is_named():
    text = INDEX.read_text(encoding="utf-8")
    for changed, entry in (
        (text.replace("`pcb`", "pcb"), "methods: pcb (2410.02396)"),
        (text.replace("arXiv:2605.05995", ""), "losses: sbr (2605.05995)"),
    ):
        assert set(forgotten(changed)) - set(forgotten(text)) == {entry}


def test_every_paper_of_the_registries_is_in_the_index():
    there = {paper for papers, _ in rows(INDEX.read_text(encoding="utf-8")) for paper in papers}
    assert {paper for _, _, papers in sources() for paper in papers} <= there


def anchors(page: Path) -> set[str]:
    """The headings of a page as links spell them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_links_and_commands_of_the_page_are_there(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:configs|docs|recipes|method_comparison)/[\w./]*\w", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        place = (page.parent / link).resolve() if link else page
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), (link, anchor)
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {name.replace("-", "_") for name in re.findall(r"`safemerge ([\w-]+)", text)} <= verbs


def test_every_row_of_the_index_says_what_runs_it():
    lines = [line for line in INDEX.read_text(encoding="utf-8").splitlines() if PAPER.search(line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(cells) > 35
    assert [row[0] for row in cells if len(row) != 5 or "`" not in row[1] + row[2]] == []
