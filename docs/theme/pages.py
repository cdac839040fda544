"""What mkdocs asks us: the navigation, which is the shelves of docs/README.md, and links that lead out of docs/.

On GitHub a page may link to any file of the repository. The site has such a file under `repository/`, and the link
leads there, so one way of writing serves both. Nothing here imports mkdocs but where it is running.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Text and target of a link; an image's, too, whose text may be empty. An anchor stays with the target.
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def site_path(repository_path: str) -> str:
    """Return where the site has a file of the repository, from the site's root."""
    inside = repository_path.removeprefix("docs/")
    return inside if inside != repository_path else f"repository/{repository_path}"


def targets(page: str, text: str) -> list[str]:
    """Return the files of the repository that a page links to, `page` and these from its root; anchors are left out."""
    links = (target.partition("#")[0] for _, target in LINK.findall(text) if "://" not in target)
    places = (posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links if link)
    return [place for place in places if (ROOT / place).is_file()]


def outside(pages: Iterable[str]) -> list[str]:
    """Return the files outside docs/ that these pages link to, and those that such files link to."""
    ahead, seen = list(pages), set()
    while ahead:
        page = ahead.pop()
        beyond = {place for place in targets(page, (ROOT / page).read_text(encoding="utf-8")) if place[:5] != "docs/"}
        ahead += sorted(place for place in beyond - seen if place.endswith(".md"))
        seen |= beyond
    return sorted(seen)


def for_the_site(page: str, text: str) -> str:
    """Return a page's text with each link to a file of the repository leading to where the site has that file."""

    def place(link: re.Match[str]) -> str:
        words, (target, mark, anchor) = link[1], link[2].partition("#")
        if not (files := targets(page, f"[]({target})")):
            return link[0]
        here = posixpath.dirname(site_path(page)) or "."
        return f"[{words}]({posixpath.relpath(site_path(files[0]), here)}{mark}{anchor})"

    return LINK.sub(place, text)


def navigation() -> list[dict[str, Any]]:
    """Return the navigation in mkdocs' form: the page of shelves, then each shelf with the pages in its order."""
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    shelves = zip(parts[::2], parts[1::2], strict=True)
    return [
        {"Documentation": "README.md"},
        *({shelf: [_entry(*link) for link in LINK.findall(body)]} for shelf, body in shelves),
    ]


def _entry(words: str, target: str) -> dict[str, Any]:
    """A page; or a folder's README with the folder's other pages beneath it, by the names of their files."""
    (page,) = targets("docs/README.md", f"[]({target})")
    folder = (ROOT / page).parent if page.endswith("/README.md") else None
    cards = sorted(folder.glob("*.md")) if folder else []
    beneath = [{card.stem: site_path(card.relative_to(ROOT).as_posix())} for card in cards if card.stem != "README"]
    return {words.replace("`", ""): [site_path(page), *beneath] if beneath else site_path(page)}


def on_config(config: Any) -> Any:
    """Give mkdocs the navigation."""
    config.nav = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files of the repository that pages link to."""
    from mkdocs.structure.files import File

    pages = [path.relative_to(ROOT).as_posix() for path in sorted(DOCS.rglob("*.md"))]
    for path in outside(pages):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead a page's links to where the site has what they mean."""
    return for_the_site(Path(page.file.abs_src_path).relative_to(ROOT).as_posix(), markdown)
