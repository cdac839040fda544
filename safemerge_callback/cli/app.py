"""The command itself: how it greets, warns and refuses."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import SafeMergeError
from ..io.printable import printable
from ..version import __version__

Read = TypeVar("Read")
# A source that cannot be read, loaded or asked, whatever the reason: never what is decided.
ERROR = 3


def say(text: str, *, err: bool = False) -> None:
    """Print lines of ours, on stderr with `err`; what names from outside would have a terminal do is written out."""
    typer.echo(printable(text, lines=True), err=err)


def or_error(source: Callable[[], Read]) -> Read:
    """Return what `source` gives; whatever goes wrong in it ends the process with ERROR, its own code."""
    try:
        return source()
    except SafeMergeError as error:
        say(f"safemerge: {error}", err=True)
    except Exception:
        say(traceback.format_exc(), err=True)
    raise typer.Exit(ERROR)


class Verb(TyperCommand):
    """A verb whose placeholders are capitals, without the braces of a required one."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line."""
        return [re.sub(r"^\{(.*)\}", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]


def examples(*lines: str) -> str:
    """Return what stands at the end of a verb's help: calls, a line each."""
    return "\b\nExamples:\n" + "\n".join(f"  safemerge {line}" for line in lines)


class _Verbs(TyperGroup):
    """Whatever this package refuses becomes one message on stderr and exit code 2, and a warning becomes a note."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            try:
                return super().invoke(ctx)
            except SafeMergeError as error:
                typer.echo(printable(f"safemerge: {error}"), err=True)
                raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Keep a language model's safety while it is fine-tuned: the verbs on files.",
)


def main() -> None:
    """Run the command line."""
    app(prog_name="safemerge")


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=lambda on: _print_version(on))] = False,
) -> None:
    """The verbs' common options."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safemerge {__version__}")
        raise typer.Exit


def _note(message: Warning | str, category: type[Warning], *_where: Any, **_more: Any) -> None:
    # What libraries tell each other of versions to come is nothing that a user of a verb can act on.
    if issubclass(category, FutureWarning):
        return
    say(f"note: {str(message).removeprefix('safemerge: ')}", err=True)
