"""Notebooks read without Jupyter: their cells, and a run of the code in one namespace, as a kernel has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    """Return the cells of a kind, in their order."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def code(path: Path) -> list[tuple[str, str]]:
    """Return a name and the Python of each code cell, without the lines that speak to the notebook (`%`)."""
    texts = ("".join(cell["source"]) for cell in cells(path))
    kept = ("\n".join("" if line.startswith("%") else line for line in text.splitlines()) for text in texts)
    return [(f"{path.name}, code cell {number}", text) for number, text in enumerate(kept, 1)]


def run(path: Path) -> dict[str, Any]:
    """Run the cells one after another, and return what they named; an error has its cell in the traceback."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for name, text in code(path):
        exec(compile(text, name, "exec"), names)
    return names
