"""The table of docs/trainers.md, written between two markers; apart from the matrix, which imports every trainer."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .cell import CellOutcome

BEGIN, END = "<!-- made by benchmarks.trainers_matrix: begin -->", "<!-- made by benchmarks.trainers_matrix: end -->"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "torchao", "liger-kernel")
WORDS = {"works": "works", "refused": "refused", "unavailable": "not run", "FAILS": "**FAILS**"}
HEADER = "| | | merged | from the formula | logits | remark |\n|---|---|---|---|---|---|"


def write_page(page: Path, outcomes: Sequence[CellOutcome]) -> None:
    """Replace what is between the markers of `page`; ValueError where it has none."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {BEGIN!r} and {END!r}: put them where the table belongs")
    page.write_text(f"{before}{BEGIN}\n\n{rendered(outcomes)}\n\n{END}{after}", encoding="utf-8")


def rendered(outcomes: Sequence[CellOutcome]) -> str:
    """A line of versions and counts, then a table for each group."""
    parts = [summary(outcomes)]
    for group in dict.fromkeys(outcome.cell.group for outcome in outcomes):
        rows = [row(outcome) for outcome in outcomes if outcome.cell.group == group]
        parts.append(f"### {group}\n\n{HEADER}\n" + "\n".join(rows))
    return "\n\n".join(parts)


def summary(outcomes: Sequence[CellOutcome]) -> str:
    """When, on what, with which versions, and how many cells came to what."""
    counts = {word: sum(WORDS[o.status] == word for o in outcomes) for word in WORDS.values()}
    counted = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    seconds = sum(outcome.seconds for outcome in outcomes)
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    where = f"{platform.machine()} CPU, Python {platform.python_version()}, {versions}"
    return f"{date.today()}, {where}: {len(outcomes)} cells in {seconds:.0f} s, {counted}."


def installed(package: str) -> str:
    """Its version, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def row(outcome: CellOutcome) -> str:
    """A cell's line."""
    figures = ["", "", ""]
    if outcome.status == "works":
        merged = f"{outcome.modules} modules, {outcome.merges} times"
        figures = [merged, f"{outcome.formula:.0e} ({outcome.dtype})", f"{outcome.logits:.0e}"]
    cells = [outcome.cell.name, WORDS[outcome.status], *figures, remark(outcome)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def remark(outcome: CellOutcome) -> str:
    """Why, in one sentence, without anything of this machine."""
    if outcome.status == "works":
        return outcome.why
    text = re.sub(r"\s+", " ", outcome.why).strip()
    text = re.sub(r"(?:/[\w.+-]+){2,}", "a folder", text)
    first = re.split(r"(?<=[a-z0-9)'\]])\. (?=[A-Z])", text)[0].rstrip(".")
    condition = f"needs {outcome.cell.needs}; without: " if outcome.cell.needs else ""
    return f"{condition}{first[:300]}"
