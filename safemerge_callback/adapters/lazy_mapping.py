"""A mapping that keeps nothing: each value is read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class OnAccess(Mapping[str, T]):
    """Name -> what `read` makes of it, anew at each access. KeyError for names that are not among `names`."""

    def __init__(self, names: Iterable[str], read: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def ordered(self, key: Callable[[str], object]) -> OnAccess[T]:
        """Return the same with its names sorted by `key`; nothing is read."""
        return OnAccess(sorted(self._names, key=key), self._read)  # type: ignore[arg-type]
