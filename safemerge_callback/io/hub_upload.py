"""Files that go to a repository of the Hub with their card, in one commit: all of them, or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SafeMergeError, first_line, shown
from .hub import client_errors, find_commit, gated

CARD_FILE = "README.md"
_REPO = re.compile(r"(?!.*(\.\.|--))\w[\w.-]*/\w[\w.-]*")
# What the Hub answers -> what that means here.
_REFUSALS = {
    401: "the token is not accepted: log in anew (`hf auth login`, or HF_TOKEN)",
    402: "the Hub asks for a payment there: give another repository",
    403: "your token may not write there: take one with write access, or a repository of your own",
    404: "there is no such repository or branch, or you may not see it",
    409: "it was changed meanwhile: push again",
    412: "it was changed meanwhile: push again",
    413: "it is too large for the Hub",
    429: "the Hub has had too many requests of yours: wait, and push again",
}


class Destination(NamedTuple):
    """Where files go on the Hub: a repository, `org/name`, and a branch of it (None: main).

    `private`: whether one that is made now is for its owner alone; None: as its owner has set. `create_pr`: propose the
    commit as a pull request. `token`: None for the login of this machine.
    """

    repo: str
    revision: str | None = None
    private: bool | None = None
    create_pr: bool = False
    message: str | None = None
    token: str | None = None


def check_destination(to: Destination, what: str, *, error: type[SafeMergeError]) -> None:
    """Raise `error` where nothing could be uploaded: an id that cannot be, offline, or not logged in.

    `what` says whose upload it is and begins the sentence. Nothing is asked of the Hub.
    """
    from huggingface_hub import constants, get_token

    if not isinstance(to.repo, str) or not _REPO.fullmatch(to.repo):
        raise error(f"{what} cannot go to {shown(to.repo)}: give the id of a repository, as 'org/name'")
    if constants.HF_HUB_OFFLINE:
        raise error(f"{what} cannot go to {to.repo!r}: the Hub is switched off here (HF_HUB_OFFLINE). Unset it first")
    if to.token is None and get_token() is None:
        raise error(f"{what} cannot go to {to.repo!r}: log in with a token that may write (`hf auth login`, HF_TOKEN)")


def upload(
    to: Destination,
    files: Mapping[str, Path | bytes],
    card: Callable[[str | None], str],
    what: str,
    *,
    error: type[SafeMergeError],
) -> str:
    """Put `files` (name in the repository -> file here, or bytes) and the card there, and return `org/name@commit`.

    The repository and the branch are made where they are not there. `card` makes the new card of the one that is there,
    or of None. All goes in one commit: a fault on the way leaves the repository as it was. What was sent of large
    files is kept there, and is not sent twice. Raises `error`, which `what` begins, as `check_destination`, and where
    the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_destination(to, what, error=error)
    api = HfApi(token=to.token, library_name="safemerge")
    with _in_our_words(to, what, error):
        api.create_repo(to.repo, private=to.private, exist_ok=True)
        if to.revision is not None and not to.revision.startswith("refs/"):
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
        head = find_commit(to.repo, to.revision, what, error=error, kind="repository", token=to.token)
        if head.sha is None:
            raise error(f"{what} cannot go to {to.repo!r}: {head.why}")
        old = _text(api, to.repo, head.sha) if CARD_FILE in head.files else None
        contents: dict[str, Path | bytes] = {**files, CARD_FILE: card(old).encode()}
        info = api.create_commit(
            to.repo,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=to.message or f"Upload {what} with safemerge",
            revision=to.revision,
            create_pr=to.create_pr,
            parent_commit=head.sha,
        )
    return f"{to.repo}@{info.oid}"


def _text(api: Any, repo: str, sha: str) -> str:
    """The card that is there."""
    return Path(api.hf_hub_download(repo, CARD_FILE, revision=sha)).read_text(encoding="utf-8")


@contextmanager
def _in_our_words(to: Destination, what: str, error: type[SafeMergeError]) -> Iterator[None]:
    """Let a refusal of the Hub, or a line that broke, say what to do; what is refused by ourselves passes."""
    from huggingface_hub.errors import GatedRepoError

    # The client wraps what breaks a large file's upload in a RuntimeError.
    broken: tuple[type[Exception], ...] = (*client_errors(), RuntimeError)
    try:
        yield
    except SafeMergeError:
        raise
    except GatedRepoError as problem:
        raise gated(to.repo, what, error) from problem
    except broken as problem:
        raise error(f"{what} did not go to {to.repo!r}: {_reason(problem)}") from problem


def _reason(problem: BaseException) -> str:
    causes = [problem]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    if isinstance(problem, ValueError) and any("Bad request" in str(one) for one in causes[1:]):
        # What the Hub has against a card's head stands in lines of its own.
        return f"{'; '.join(line.strip(' -.') for line in str(problem).splitlines())}. Nothing was committed."
    statuses = [getattr(getattr(one, "response", None), "status_code", None) for one in causes]
    refusal = next((_REFUSALS[status] for status in statuses if status in _REFUSALS), None)
    if refusal is not None:
        return f"{refusal}. Nothing was committed."
    said = "; ".join(dict.fromkeys(first_line(one).rstrip(".") for one in causes[:2]))
    return f"{said}. Push again: all of it is one commit at the end, and what was sent is not sent twice."
