"""What names a checkpoint, an adapter or a subspace: a path on this machine, or `org/name[@revision]` on the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import SafeMergeError, first_line, shown
from .paths import as_path, existing

# As the Hub has it; `..` in a name or a revision would lead out of its cache.
_HUB_ID = re.compile(r"(?!.*\.\.)(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./+-]+))?")
# The folders of an absolute path within a sentence, in quotation marks with blanks; not those of an address on the net,
# nor of `org/name`.
_FOLDERS = re.compile(
    r"(?<=['\"])~?/(?:[^/'\"]+/)+(?=[^/'\"])"
    r"|(?<![\w.~/:-])~?/(?:[^/\s'\":,;()]+/)+(?=[^/\s])"
    r"|(?<!\w)[A-Za-z]:\\(?:[^\\\s'\"]+\\)+"
)
_CACHE_FOLDER = re.compile(r"models--(.+)")


class Address(NamedTuple):
    """Where something lies: `path` here, or where that is None `repo` on the Hub at `revision` (None: main)."""

    path: Path | None
    repo: str = ""
    revision: str | None = None


def address_of(
    source: str | Path, what: str, *, error: type[SafeMergeError], revision: str | None = None, kind: str = "folder"
) -> Address:
    """Return what `source` names: a path that is there, always, else a Hub id, `org/name[@revision]`.

    `what` says whose address it is and begins the sentence of `error`, raised where `source` is neither, and where
    `revision` is given beside another one; `kind` is what was looked for here.
    """
    path = as_path(source, what, error=error)
    if path.exists():
        return Address(path)
    match = _HUB_ID.fullmatch(str(source))
    if not match:
        raise error(
            f"{what} {shown(str(source))}: no such {kind}, and not a Hub id such as 'org/name' or 'org/name@revision'."
        )
    if revision and match["revision"] and revision != match["revision"]:
        raise error(f"{what} {shown(str(source))}: revision={revision!r} is given too; leave one of them out.")
    return Address(None, match["repo"], revision or match["revision"])


def fetched(address: Address, patterns: Sequence[str], what: str, *, error: type[SafeMergeError]) -> Path:
    """Return the folder at an address: on this machine, or in the Hub's cache with all files of `patterns`.

    `what` begins the sentence of `error`, raised where the Hub does not give them.
    """
    if address.path is not None:
        return address.path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(address.repo, revision=address.revision, allow_patterns=[*patterns]))
    except (OSError, ValueError) as problem:  # every error of the Hub's client is one of the two
        at = f" at revision {address.revision!r}" if address.revision else ""
        raise error(
            f"{what} {address.repo!r} is no folder here and could not be fetched from the Hub{at}: "
            f"{first_line(problem)}"
        ) from problem


def source_name(source: str | Path) -> str:
    """Return a name for `source` that holds no machine path: a Hub id as it is, a path's last part."""
    path = existing(source)
    if path is not None:
        return identity(path)[0]
    return str(source) if _HUB_ID.fullmatch(str(source)) else Path(source).name


def without_folders(text: str) -> str:
    """Return a sentence with each absolute path in it cut to its last part: what may leave this machine."""
    return _FOLDERS.sub("", text)


def identity(folder: Path, revision: str | None = None) -> tuple[str, str | None]:
    """Return name and revision of a folder; those of the model where it is a snapshot in the Hub's cache."""
    folder = folder.resolve()
    for parent in folder.parents[1:2]:
        match = _CACHE_FOLDER.fullmatch(parent.name)
        if match and folder.parent.name == "snapshots":
            return match[1].replace("--", "/", 1), folder.name
    return folder.name, revision
