"""Safetensors files and the folders that they lie in: headers, and runs of the values of one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import SubspaceError
from ...io.documents import read_text
from ...io.file_faults import reading_fault


class ShardFile(Protocol):
    """A safetensors file of a checkpoint. Every method raises SubspaceError where it cannot be read."""

    @property
    def name(self) -> str:
        """The file's name, without its folder."""

    def size(self) -> int:
        """Return how many bytes the file has."""

    def header(self) -> bytes:
        """Return the file's first bytes: the header's length (8 bytes, little endian), and the header."""

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return key -> shape and dtype of every tensor, the dtype as safetensors names it, such as `BF16`."""

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Return `count` values of one tensor from the flat position `start` on, (count,), in the stored dtype."""


class LocalFile(NamedTuple):
    """A file on this machine; what is read are maps of it, which take no memory until their values are used."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self.path.name

    def size(self) -> int:
        """Return how many bytes the file has."""
        with _reading(self.path):
            return self.path.stat().st_size

    def header(self) -> bytes:
        """Return the header with its length in front."""
        with _reading(self.path), self.path.open("rb") as file:
            length = file.read(8)
            return length + file.read(int.from_bytes(length, "little"))

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return what the header lists; the library checks that the file is as long as the header says."""
        with _reading(self.path), safe_open(self.path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (a safe_open is no mapping)
            return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Return a view of the map."""
        # Opened anew for each tensor, so that the pages of the one before are given back.
        with _reading(self.path), safe_open(self.path, framework="pt") as file:
            return file.get_tensor(key).reshape(-1)[start : start + count]


class Folder(Protocol):
    """A model's folder, here or on the Hub."""

    def names(self) -> list[str]:
        """Return the names of the files that lie in it, sub-folders left out."""

    def text(self, name: str) -> str:
        """Return the content of a small file."""

    def shard(self, name: str) -> ShardFile:
        """Return one of its safetensors files."""


class LocalFolder(NamedTuple):
    """A folder on this machine."""

    path: Path

    def names(self) -> list[str]:
        """Return the names of the files that lie in it; links to nowhere, as of a cache cut short, are left out."""
        with _reading(self.path):
            return sorted(path.name for path in self.path.iterdir() if path.is_file())

    def text(self, name: str) -> str:
        """Return the content of a small file."""
        return read_text(self.path / name, repr(str(self.path / name)), error=SubspaceError, advice=_AGAIN)

    def shard(self, name: str) -> ShardFile:
        """Return one of its safetensors files."""
        return LocalFile(self.path / name)


_DAMAGE = "is not a readable safetensors file: corrupt, cut short, or a Git LFS pointer"
_AGAIN = "Download it again."


@contextmanager
def _reading(path: Path, damage: str = _DAMAGE) -> Iterator[None]:
    """Raise SubspaceError for what is raised of a file here, with the reason that the file itself gives."""
    try:
        yield
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise SubspaceError(f"{str(path)!r} {reading_fault(path, error, _AGAIN, damage)}") from error


def unreadable(name: str, error: object) -> SubspaceError:
    """Return the error for a file on the Hub that is damaged."""
    return SubspaceError(f"{name!r} {_DAMAGE} ({error}). {_AGAIN}")
