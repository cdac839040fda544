"""Read the next module from the disk while the present one is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """`take` returns `read(name)` of each name in turn; `start` has the one after read in the background; in a `with`.

    The caller says `start` once it has let go of what it took last, so that no two are in memory. None is kept here
    once taken. What `read` raises, `take` raises.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], T]) -> None:
        self._names: Iterator[str] = iter(names)
        self._read = read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._next: Future[T] | None = None

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self) -> None:
        """Begin to read the next one, unless that has begun or there is none."""
        if self._next is None and (name := next(self._names, None)) is not None:
            self._next = self._pool.submit(self._read, name)

    def take(self) -> T:
        """Return the next one, waiting for it if need be; StopIteration after the last."""
        self.start()
        if self._next is None:
            raise StopIteration
        taken, self._next = self._next, None
        return taken.result()


def spans_of(path: Path) -> dict[str, tuple[int, int]]:
    """Return where the values of each tensor of a safetensors file are: key -> first byte, number of bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        listed = json.loads(file.read(size))
    spans = {key: entry["data_offsets"] for key, entry in listed.items() if key != "__metadata__"}
    return {key: (8 + size + start, end - start) for key, (start, end) in spans.items()}


def will_need(path: Path, spans: Iterable[tuple[int, int]]) -> None:
    """Have the system read these bytes of a file into its page cache in the background; nothing where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    # Advice only: what is wrong with the file is told when it is read.
    with suppress(OSError), path.open("rb", buffering=0) as file:
        for start, length in spans:
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)
