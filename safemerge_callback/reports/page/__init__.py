"""A history as one HTML file that needs nothing: no network, no server, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...io.outputs import FileKind, new_output
from ...io.paths import as_path
from ...record.history import History
from ..payload import page_data
from .figures import page_figures

_PAGE = FileKind("a page of ours", lambda head: b"<!doctype html>" in head and b"require-trusted-types-for" in head)
_HERE = Path(__file__).parent
# In this order: what is above uses nothing of what is below.
_SCRIPTS = ("data.js", "chart.js", "heatmap.js", "curves.js", "terms.js", "table.js", "start.js")


def write_page(history: History, output: str | Path) -> Path:
    """Write the page of `history` to `output` (.html) and return the path. A page of ours of that name is replaced.

    Raises ConfigError for another ending, for what is there and is no page of ours, or where it cannot be written.
    """
    path = as_path(output, "report")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"report {str(output)!r}: the name of a page must end in .html.")
    with new_output(path, "report", _PAGE) as part:
        part.write_text(render_page(history), encoding="utf-8", errors="backslashreplace")
    return path


def render_page(history: History) -> str:
    """Return the page as text.

    Its Content-Security-Policy names the one script and the one style by their digests and allows nothing else, so that
    a name which found its way into the page as markup could neither run nor load anything.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    style = (_HERE / "page.css").read_text(encoding="utf-8")
    parts = [(_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = "\n".join(['"use strict";', "(() => {", *parts, "})();"])
    room = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    values = {"data": _embedded(page_data(history)), "style": style, "script": script}
    digests = {"style_digest": _digest(style), "script_digest": _digest(script)}
    return room.get_template("page.html.j2").render(**values, **digests, **page_figures(history)) + "\n"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """JSON that cannot end the element it stands in, nor open a comment there."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
