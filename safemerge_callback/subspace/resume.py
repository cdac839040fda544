"""What a killed write left behind, and how the next goes on: a format of its own, a line of JSON a finished step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import SubspaceError
from ..io.documents import UNREADABLE, read_text
from .digests import TensorDigest

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be replaced anyway
    fcntl = None  # type: ignore[assignment]

_ADVICE = "Remove it, and the build begins anew."
# Bytes read at a time to check what is kept.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Step:
    """A finished step: the caller's own `record`, the header entries of the tensors written in it, and their digests.

    `end` is how many bytes of tensors the file has after it.
    """

    record: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    end: int = 0


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Refuse with SubspaceError to be the second process that writes `output`; the lock of a killed one is void."""
    path = output.with_name(f".{output.name}.lock")
    file = _locked(path, output)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _locked(path: Path, output: Path) -> IO[bytes]:
    while True:
        file = path.open("ab")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise SubspaceError(
                f"{str(output)!r} is being written by another process; wait for it, or give another output."
            ) from error
        # The process before may have removed the file between our opening and locking it.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


class StepLog:
    """The finished steps of a file under way, beside it on the disk.

    A line is appended after a step's bytes. Neither is forced to the disk, since a kill loses nothing that was written;
    after a power cut the digests show how much of it arrived.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self._key = json.loads(json.dumps(key))
        self._file: IO[str] | None = None

    def kept(self, partial: Path, start: int) -> list[Step] | None:
        """Return the steps whose bytes stand whole in `partial` from byte `start` on; None where another key's are."""
        if not self.path.exists():
            return []
        who = f"what an unfinished build left in {str(self.path)!r}"
        lines = read_text(self.path, who, error=SubspaceError, advice=_ADVICE).split("\n")
        # What follows the last line feed is a line that was being written.
        if len(lines) < 2 or not partial.is_file():
            return []
        try:
            key = json.loads(lines[0])
        except RecursionError as error:
            raise SubspaceError(f"{who} cannot be read: it is nested too deep. {_ADVICE}") from error
        except ValueError:
            key = None
        if key != self._key:
            return None
        return list(_intact(lines[1:-1], partial, start))

    def restart(self, steps: list[Step]) -> None:
        """Write the log anew with these steps, and keep it open for more."""
        self._file = self.path.open("w", encoding="utf-8")
        # In one write, so that a kill finds the log as it was or whole.
        self._write(self._key, *(asdict(step) for step in steps))

    def add(self, step: Step) -> None:
        """Note one more step, whose bytes have left for the disk."""
        self._write(asdict(step))

    def close(self) -> None:
        """Close the log and leave it where it is."""
        if self._file is not None:
            self._file.close()

    def _write(self, *values: Any) -> None:
        assert self._file is not None, "restart comes first"
        self._file.write("".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values))
        self._file.flush()


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except UNREADABLE:
        return None


def _intact(lines: list[str], partial: Path, start: int) -> Iterator[Step]:
    """The steps up to the first whose line is torn or whose bytes are not those that were written."""
    with partial.open("rb") as file:
        for line in lines:
            raw = _parsed(line)
            if not isinstance(raw, dict) or set(raw) != {"record", "tensors", "digests", "end"}:
                return
            step = Step(**raw)
            try:
                offsets = {name: step.tensors[name]["data_offsets"] for name in step.digests}
            except (KeyError, TypeError):
                return
            if any(_digest(file, start + a, b - a) != step.digests[name] for name, (a, b) in offsets.items()):
                return
            yield step


def _digest(file: IO[bytes], start: int, length: int) -> str:
    digest = TensorDigest()
    file.seek(start)
    while length > 0 and (data := file.read(min(length, _CHUNK))):
        digest.update(data)
        length -= len(data)
    return digest.hexdigest() if length == 0 else ""
