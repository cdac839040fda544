"""The verb that shares what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .app import Verb, app, examples, show


@app.command(
    cls=Verb,
    epilog=examples(
        "push model.subspace.safetensors ORG/MODEL-SUBSPACE",
        "push ADAPTER ORG/SAFETY-LORA --base-model ORG/CHAT --private",
    ),
)
def push(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Subspace file, or folder of a LoRA adapter.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hub, org/name; made if need be.")],
    base_model: Annotated[
        str | None, typer.Option(help="What the adapter's base is called on the Hub, where its config has a folder.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a repository that is made now. [default: as yours]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if need be. [default: main]")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Of the one commit.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence in a new card's head, as the Hub names it; none is stated otherwise.")
    ] = None,
) -> None:
    """Upload a subspace or an adapter to the Hub, with a card, in one commit; needs a login that may write."""
    from ..io.paths import as_path
    from ..offline import push_adapter
    from ..subspace import Subspace

    how: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr}
    how |= {"commit_message": commit_message, "license": license}
    if as_path(source, "source").is_dir():
        address = push_adapter(source, repo_id, base_model=base_model, **how)
    elif base_model is not None:
        raise ConfigError("--base-model is of an adapter: a subspace file knows its checkpoints, drop it")
    else:
        address = Subspace.load(source).push_to_hub(repo_id, **how)
    show(address, {"source": source, "address": address})
