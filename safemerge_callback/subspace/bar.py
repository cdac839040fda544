"""A progress bar on stderr: bytes, bytes a second, time left, and what is worked on; within 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..io.bars import bars_shown
from ..io.printable import printable

# Of the columns that a narrow terminal has, what the name of a module may take; its end tells the modules apart.
_NAME = 18


@contextmanager
def byte_bar(
    description: str, total: int, done: int, *, shown: bool, note: str = ""
) -> Iterator[Callable[[str, int], None]]:
    """Yield `advance(what, bytes)`, which shows what is worked on and counts bytes; silent unless `shown`.

    On a terminal only. `note` stands where the first module's name will.
    """
    if not (shown and bars_shown()):
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}"),
        # what the other columns leave
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", markup=False, table_column=Column(width=_NAME, no_wrap=True)),
    )
    with Progress(*columns, console=Console(stderr=True), expand=True) as progress:
        task = progress.add_task(description, total=total, completed=done, what=_ending(note))
        yield lambda what, count: progress.update(task, advance=count, what=_ending(what))


def _ending(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _silent(_what: str, _count: int) -> None:
    return
