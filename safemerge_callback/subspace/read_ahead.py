"""Read the next module from the disk while the present one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_PAGE = 4096


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


def touch(weight: Tensor) -> Tensor:
    """Bring the pages of a mapped (rows, columns) tensor into memory, and return it."""
    rows = weight if weight.stride(-1) == 1 else weight.mT
    # By numpy: a torch operation in a second thread starts a second set of threads, which compete with the first.
    rows.view(torch.uint8).numpy()[:, ::_PAGE].sum()
    return weight
