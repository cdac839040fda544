"""Tables as text, for `print`, and as HTML, for notebooks."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from .printable import printable

# Wider than any module name with its reason, so that nothing is cut or wrapped: a table is as wide as what it holds.
_WIDTH = 2000
# Title, columns, rows, and the columns that are aligned to the right: what both views are made of.
Table = tuple[str, Sequence[str], Iterable[Sequence[str]], Sequence[str]]


def render(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Return one line a row under `columns`; those named in `right` are aligned to the right. No colours, no markup."""
    table = Grid()
    for column in columns:
        table.add_column(Text(printable(column)), justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None)
    console.print(Text(printable(title)))
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Return the same as one HTML table with `title` as its caption; every text is escaped."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(map(cell, cells, columns, [tag] * len(columns))) + "</tr>"

    def cell(text: str, column: str, tag: str) -> str:
        side = "right" if column in right else "left"
        return f'<{tag} style="text-align: {side}">{html.escape(text)}</{tag}>'

    caption = f'<caption style="text-align: left">{html.escape(title)}</caption>'
    body = "".join(row(cells, "td") for cells in rows)
    return f"<table>{caption}<thead>{row(columns, 'th')}</thead><tbody>{body}</tbody></table>"
