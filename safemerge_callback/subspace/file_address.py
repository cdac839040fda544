"""Where a subspace file is: here, in a folder, or in a repository of the Hub, at one commit of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import SubspaceError, shown
from ..io.addresses import address_of
from ..io.hub import cached_folder, downloaded, find_commit
from ..io.paths import as_path

_SUFFIX = ".safetensors"
# What may be asked of a repository, and written beside other files: a plain name.
_PLAIN = re.compile(rf"\w[\w.-]*{re.escape(_SUFFIX)}")
# What models and adapters call their weights.
_WEIGHTS = re.compile(r"((adapter_)?model(-\d+-of-\d+)?|consolidated.*)\.safetensors")
_BUILD = "Write one with build_subspace, or `safemerge build`."


class FileAddress(NamedTuple):
    """A subspace file: its `path` on this machine, and where it came from the Hub its `address` there.

    The address is `org/name@commit/FILE.safetensors`, as the Hub's client writes files: it opens this very file again.
    """

    path: Path
    address: str | None = None


def find_file(source: str | Path, revision: str | None = None) -> FileAddress:
    """Return where the subspace file of `source` is; from the Hub it is fetched into the Hub's cache.

    source: a file, a folder with one, or a Hub id: `org/name`, `org/name@revision`, and where a repository has several
        `org/name@revision/FILE.safetensors`. A path that is there wins over a Hub id of the same spelling.
    The revision is turned into a commit first. Offline the cache is all there is. Raises SubspaceError where there is
    no such file or repository, where it may not be read, and where a folder or repository has no subspace file, or
    more than one.
    """
    path = as_path(source, "subspace", error=SubspaceError)
    if path.is_dir():
        names = [one.name for one in path.iterdir() if one.is_file()]
        return FileAddress(path / _only(names, f"subspace {str(path)!r}: the folder", "give the path of one"))
    if path.exists():
        return FileAddress(path)
    named, file = _split(str(source))
    # A lost file, rather than a repository of such a name.
    if named.endswith(_SUFFIX) or "/" not in named.partition("@")[0].strip("/."):
        raise SubspaceError(
            f"subspace {shown(str(path))}: no such file, and not a Hub id such as 'org/name' or 'org/name@revision'. "
            f"{_BUILD}"
        )
    address = address_of(named, "subspace", error=SubspaceError, revision=revision, kind="file")
    return _fetched(address.repo, address.revision, file)


def cached_file(address: str) -> Path | None:
    """Return where the Hub's cache has the file of an `org/name@revision/FILE`; None where it has not, or for a path.

    Nobody is asked.
    """
    named, file = _split(address)
    repo, _, revision = named.partition("@")
    folder = cached_folder(repo, revision) if file else None
    return folder / file if folder is not None and (folder / file).is_file() else None


def _split(source: str) -> tuple[str, str]:
    """A Hub id, and the file of that repository, or nothing."""
    named, _, file = source.rpartition("/")
    return (named, file) if file.endswith(_SUFFIX) and "@" in named else (source, "")


def plain_name(name: str, what: str) -> str:
    """Return the name of a file beside another one; SubspaceError for a path, which could lead anywhere."""
    if not name or Path(name).name != name or "\\" in name or name.startswith("."):
        raise SubspaceError(f"{what} names the file {shown(name)}: a plain name is allowed, without a folder")
    return name


def hub_name(path: Path) -> str:
    """Return the name that a subspace file has in a repository; SubspaceError for one that nobody would find there."""
    if not _PLAIN.fullmatch(path.name) or _WEIGHTS.fullmatch(path.name):
        raise SubspaceError(
            f"subspace {str(path)!r} cannot have this name on the Hub: call it like 'model.subspace.safetensors', with "
            "letters, digits, '-', '_' and '.'"
        )
    return path.name


def _fetched(repo: str, revision: str | None, file: str) -> FileAddress:
    """The file of a repository, of one commit; where the Hub cannot be asked, what its cache has."""
    commit = find_commit(repo, revision, "subspace", error=SubspaceError, kind="file")
    where = f"subspace {repo!r}: the repository"
    if commit.sha is not None:
        name = _chosen(file, commit.files, where, f"{repo}@{revision or 'main'}")
        path, sha = downloaded(repo, revision, name, "subspace", error=SubspaceError)
        return FileAddress(path, f"{repo}@{sha}/{name}")
    folder = cached_folder(repo, revision)
    if folder is None:
        raise SubspaceError(
            f"subspace {repo!r} is no file here and could not be fetched from the Hub"
            f"{f' at revision {revision!r}' if revision else ''}: {commit.why}"
        )
    name = _chosen(file, [one.name for one in folder.iterdir()], f"{where} in the Hub's cache", f"{repo}@{folder.name}")
    return FileAddress(folder / name, f"{repo}@{folder.name}/{name}")


def _chosen(file: str, names: Iterable[str], where: str, prefix: str) -> str:
    """The file that was asked for by name, or else the only one."""
    if not file:
        return _only(names, where, f"name one, as {prefix}/FILE")
    if plain_name(file, "subspace's address") not in (names := list(names)):
        raise SubspaceError(f"{where} has no {file!r}, only {_listed(names)}")
    return file


def _only(names: Iterable[str], where: str, advice: str) -> str:
    names = sorted(names)
    candidates = [name for name in names if _PLAIN.fullmatch(name) and not _WEIGHTS.fullmatch(name)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise SubspaceError(f"{where} has {len(candidates)} safetensors files ({_listed(candidates)}): {advice}")
    raise SubspaceError(f"{where} has no subspace file, only {_listed(names) or 'nothing'}. {_BUILD}")


def _listed(names: Iterable[str]) -> str:
    """Some names, as a message shows them."""
    names = list(names)
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
