"""Files inside installed wheels and a downloaded source archive: found by their metadata, never imported, never copied."""

from __future__ import annotations

import io
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from safemerge_callback.errors import ConfigError

ARCHIVES = Path(sys.prefix) / "share" / "safemerge"
_HOW = "`make install` installs it (requirements/data.txt and requirements/sentiment.txt)"


def package_file(distribution: str, ending: str) -> Path:
    """Return the one file of an installed distribution whose path ends with `ending`; ConfigError where it is absent."""
    try:
        found = [f for f in files(distribution) or [] if f.as_posix().endswith(ending)]
    except PackageNotFoundError:
        raise ConfigError(f"data package {distribution!r} is not installed: {_HOW}") from None
    if len(found) != 1:
        raise ConfigError(f"{distribution!r} holds {len(found)} files that end in {ending!r}, not one: {_HOW}")
    return Path(str(found[0].locate()))


def archive_member(archive: str, *members: str) -> bytes:
    """Return the bytes of a file inside a source archive, each further member inside the archive before it."""
    found = sorted(ARCHIVES.glob(archive))
    if not found:
        raise ConfigError(f"source archive {archive!r} is not in {ARCHIVES.name}/: {_HOW}")
    content = found[0].read_bytes()
    for member in members:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            name = next(name for name in tar.getnames() if name.endswith(member))
            opened = tar.extractfile(name)
            assert opened is not None, name
            content = opened.read()
    return content
