"""A progress bar on stderr: modules, bytes a second, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_bar(description: str, total: int, done: int, *, shown: bool) -> Iterator[Callable[[str, int], None]]:
    """Yield `advance(what, bytes)`, which shows what is worked on and counts bytes; silent unless `shown`."""
    if not shown:
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, completed=done, what="")
        yield lambda what, count: progress.update(task, advance=count, what=what)


def _silent(_what: str, _count: int) -> None:
    return
