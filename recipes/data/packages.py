"""Files inside installed wheels and a downloaded source archive: read where they lie, never imported, never copied."""

from __future__ import annotations

import io
import sys
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.prompts import package_files

ARCHIVES = Path(sys.prefix) / "share" / "safemerge"
_HOW = "`make demo` installs it (requirements/data.txt, sentiment.txt and compare.txt)"
_AGAIN = f"delete it and .venv/.installed, then {_HOW}"


def package_file(distribution: str, ending: str) -> Path:
    """Return the one file of an installed distribution whose path ends with `ending`; ConfigError if it is absent."""
    paths = package_files(distribution, ending)
    if paths is None:
        raise ConfigError(f"data package {distribution!r} is not installed: {_HOW}")
    if len(paths) != 1:
        raise ConfigError(f"{distribution!r} holds {len(paths)} files that end in {ending!r}, not one: {_HOW}")
    if not paths[0].is_file():
        raise ConfigError(f"{distribution!r} lost its file {ending!r} after it was installed: {_HOW}")
    return paths[0]


def archive_member(archive: str, *members: str) -> bytes:
    """Return the bytes of a file in a source archive, each further member a file in the archive before it.

    `archive` is a pattern within `ARCHIVES`, `members` are file names without folders; all is read in memory.
    ConfigError where the archive or a member is absent, or the archive is no tar file.
    """
    archives = sorted(ARCHIVES.glob(archive))
    if not archives:
        raise ConfigError(f"source archive {archive!r} is not in share/safemerge of this environment: {_HOW}")
    content = archives[0].read_bytes()
    for member in members:
        content = _member(content, member, archives[0].name)
    return content


def _member(content: bytes, member: str, archive: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            opened = [tar.extractfile(m) for m in tar.getmembers() if PurePosixPath(m.name).name == member]
            if len(opened) == 1 and opened[0] is not None:
                return opened[0].read()
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        raise ConfigError(f"{archive} is corrupt or truncated: {_AGAIN}") from None
    raise ConfigError(f"{archive} does not hold one file {member!r}: {_AGAIN}")
