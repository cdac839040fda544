"""Tables as text, for `print`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Wider than any module name with its reason, so that nothing is cut or wrapped: a table is as wide as what it holds.
_WIDTH = 2000


def render(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Return one line a row under `columns`; those named in `right` are aligned to the right. No colours, no markup."""
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None)
    console.print(Text(title))
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
