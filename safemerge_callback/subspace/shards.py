"""One checkpoint, one tensor at a time: no more of a model in memory than is being read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters import canonical_name
from ..errors import SubspaceError, nearest
from .header import DTYPES
from .locate import Located, locate

# The embedding that an absent lm_head shares its weight with, by its last name part.
_TIED_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


class _Entry(NamedTuple):
    key: str
    file: Path
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True, eq=False)
class CheckpointShards:
    """The 2-D weights (linear layers and embeddings) of a safetensors checkpoint, read one by one.

    Make it with `CheckpointShards.open`; then only headers have been read. Names are canonical.
    """

    located: Located
    _entries: Mapping[str, _Entry]

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> CheckpointShards:
        """Open a folder (single file or sharded), a `.safetensors` file, or a Hub id.

        Where `lm_head` is absent it is the input embedding (tied weights). Raises SubspaceError for a checkpoint that
        is corrupt, incomplete, or not in safetensors, and where two keys have one canonical name.
        """
        located = locate(source, revision)
        entries: dict[str, _Entry] = {}
        for file in located.files:
            for name, entry in _read_entries(file).items():
                if name in entries:
                    raise SubspaceError(
                        f"checkpoint {str(source)!r}: {entries[name].key!r} and {entry.key!r} are both module {name!r}."
                    )
                entries[name] = entry
        if not entries:
            raise SubspaceError(
                f"checkpoint {str(source)!r} has no 2-D `.weight` tensor; quantised ones (GPTQ, AWQ, ...) are not read."
            )
        _alias_tied_head(entries)
        return cls(located, entries)

    @property
    def names(self) -> dict[str, str]:
        """Canonical module name -> key in the checkpoint."""
        return {name: entry.key for name, entry in self._entries.items()}

    def shape(self, name: str) -> tuple[int, int]:
        """Return the weight's shape as stored, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Return the weight's safetensors dtype, such as `BF16`, from the header."""
        return self._entry(name).dtype

    def read(self, name: str) -> Tensor:
        """Return one weight on the CPU in its stored dtype and orientation; do not write to it (it may be a map)."""
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise SubspaceError(
                f"checkpoint {self.located.name!r}: {entry.key!r} is stored as {entry.dtype}, a quantised format; "
                f"allowed are {', '.join(DTYPES)}. Use the unquantised checkpoint."
            )
        # Opened anew for each tensor, so that the pages of the one before are given back.
        try:
            with safe_open(entry.file, framework="pt") as file:
                return file.get_tensor(entry.key)
        except (SafetensorError, OSError) as error:
            raise _unreadable(entry.file, error) from error

    def fingerprint(self) -> dict[str, Any]:
        """Return {source, revision, files, sha256}: no machine path; the hash is of all shards' headers, in order."""
        digest = hashlib.sha256()
        for path in self.located.files:
            with path.open("rb") as file:
                length = file.read(8)
                digest.update(length + file.read(int.from_bytes(length, "little")))
        files = [path.name for path in self.located.files]
        name, revision = self.located.name, self.located.revision
        return {"source": name, "revision": revision, "files": files, "sha256": digest.hexdigest()}

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise SubspaceError(
                f"checkpoint {self.located.name!r} has no module {name!r}{nearest(name, self._entries)}."
            )
        return self._entries[name]


def _unreadable(path: Path, error: BaseException) -> SubspaceError:
    return SubspaceError(
        f"{path.name!r} is not a readable safetensors file: corrupt, cut short, or a Git LFS pointer ({error}). "
        "Download it again."
    )


def _read_entries(path: Path) -> dict[str, _Entry]:
    """The 2-D `.weight` tensors that one file's header lists, by canonical name."""
    entries: dict[str, _Entry] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safe_open is no mapping)
                shape = tuple(file.get_slice(key).get_shape())
                if len(shape) != 2 or not key.endswith(".weight"):
                    continue
                name = canonical_name(key)
                if name in entries:
                    raise SubspaceError(f"{path.name!r}: {entries[name].key!r} and {key!r} are both module {name!r}.")
                entries[name] = _Entry(key, path, shape, file.get_slice(key).get_dtype())
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return entries


def _alias_tied_head(entries: dict[str, _Entry]) -> None:
    if "lm_head" in entries:
        return
    tied = [entry for name, entry in entries.items() if name.rpartition(".")[2] in _TIED_EMBEDDINGS]
    if len(tied) == 1:
        entries["lm_head"] = tied[0]
