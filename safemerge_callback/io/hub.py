"""What the Hub says of a repository, what of it is in the cache, and what its refusals mean in our words."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import SafeMergeError, first_line


class Commit(NamedTuple):
    """One commit of a repository, and the files at its top; where `sha` is None, `why` the Hub could not be asked."""

    sha: str | None
    files: tuple[str, ...] = ()
    why: str = ""


def find_commit(
    repo: str,
    revision: str | None,
    what: str,
    *,
    error: type[SafeMergeError],
    kind: str = "folder",
    token: str | None = None,
) -> Commit:
    """Return the commit that `revision` (default: main) is now, so that all that is read is of one state.

    `what` begins the sentence of `error`, raised where the Hub says that there is no such model or revision, or that it
    may not be read; `kind` is what was looked for on this machine.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi(token=token).model_info(repo, revision=revision, timeout=30)
    except RevisionNotFoundError as problem:
        raise error(f"{what} {repo!r} has no revision {revision!r} on the Hub.") from problem
    except GatedRepoError as problem:
        raise gated(repo, what, error) from problem
    except RepositoryNotFoundError as problem:
        raise error(
            f"{what} {repo!r} is no {kind} here and no model on the Hub, or a private one. Check the spelling, or "
            "log in (`hf auth login`, or HF_TOKEN)."
        ) from problem
    except client_errors() as problem:
        return Commit(None, why=first_line(problem))
    names = sorted(file.rfilename for file in info.siblings or ())
    return Commit(info.sha, tuple(name for name in names if "/" not in name))


def cached_folder(repo: str, revision: str | None) -> Path | None:
    """Return where the Hub's cache has this revision, whole or in part; None where it has nothing of it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        folder = getattr(error, "snapshot_path", None)
        return Path(folder) if folder else None


def downloaded(
    repo: str, revision: str | None, name: str, what: str, *, error: type[SafeMergeError]
) -> tuple[Path, str]:
    """Return a file of a revision in the Hub's cache, fetched where it is not there yet, and the commit that it is of.

    Asked for by its branch, which the cache then knows offline, too. `error` where it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    try:
        path = Path(hf_hub_download(repo, name, revision=revision, library_name="safemerge"))
    except GatedRepoError as problem:
        raise gated(repo, what, error) from problem
    except client_errors() as problem:
        raise error(
            f"{what} {repo!r}: {name} could not be fetched from the Hub: {first_line(problem)}. Start again: what came "
            "is kept."
        ) from problem
    return path, path.parent.name


def gated(repo: str, what: str, error: type[SafeMergeError]) -> SafeMergeError:
    """Return the error of a repository whose terms were not accepted."""
    return error(
        f"{what} {repo!r} is gated: accept its terms on its page on the Hub, and log in (`hf auth login`, or HF_TOKEN)."
    )


def client_errors() -> tuple[type[Exception], ...]:
    """Return the client's own errors and those of the HTTP library under it, whose name differs between releases."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error = next(base for base in HfHubHTTPError.__bases__ if base.__name__ == "HTTPError")
    return (http_error, OSError, ValueError)
