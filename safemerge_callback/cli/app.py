"""The command itself: how it greets, warns and refuses."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Annotated, Any, NamedTuple, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import SafeMergeError
from ..io.bars import without_bars
from ..io.plain import json_text
from ..io.printable import printable
from ..version import __version__

Read = TypeVar("Read")
# A source that cannot be read, loaded or asked, whatever the reason: never what is decided.
ERROR = 3


class _Output(NamedTuple):
    """How a verb speaks: as JSON and nothing else on stdout; without anything but errors, and JSON if that is asked."""

    as_json: bool = False
    quiet: bool = False


_OUTPUT: ContextVar[_Output] = ContextVar("safemerge_output")


def show(text: str, document: Mapping[str, Any]) -> None:
    """Print what a verb came to, once: `document` as JSON with --json, else `text`, and nothing with --quiet alone."""
    output = _OUTPUT.get(_Output())
    if output.as_json:
        typer.echo(json_text(document))
    elif not output.quiet:
        _say(text)


def note(text: str) -> None:
    """Print lines beside the result, on stderr; nothing with --quiet."""
    if not _OUTPUT.get(_Output()).quiet:
        _say(text, err=True)


def refuse(text: str) -> None:
    """Print an error, on stderr."""
    _say(text, err=True)


def _say(text: str, *, err: bool = False) -> None:
    # What names from outside would have a terminal do is written out.
    typer.echo(printable(text, lines=True), err=err)


def or_error(source: Callable[[], Read]) -> Read:
    """Return what `source` gives; whatever goes wrong in it ends the process with ERROR, its own code."""
    try:
        return source()
    except SafeMergeError as error:
        refuse(f"safemerge: {error}")
    except Exception:
        refuse(traceback.format_exc())
    raise typer.Exit(ERROR)


class Screen(TyperCommand):
    """A verb that draws on the terminal; its placeholders are capitals, without the braces of a required one."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line."""
        return [re.sub(r"^\{(.*)\}", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]


class Verb(Screen):
    """A verb that comes to something, which it hands to `show`: it has --json and --quiet, and its function neither."""

    def __init__(self, *arguments: Any, params: list[Any] | None = None, **options: Any) -> None:
        super().__init__(*arguments, params=[*(params or []), *_spoken()], **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb, which speaks as these two options say."""
        output = _Output(ctx.params.pop("as_json"), ctx.params.pop("quiet"))
        token = _OUTPUT.set(output)
        try:
            with without_bars(output.quiet):
                return super().invoke(ctx)
        finally:
            _OUTPUT.reset(token)


def _spoken() -> list[Any]:
    """The two options of every verb, as typer makes them of a function that has no others."""

    def function(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
        quiet: Annotated[
            bool,
            typer.Option("--quiet", "-q", help="Print no table, notes or progress; errors, and what --json prints."),
        ] = False,
    ) -> None:
        """Nothing."""

    alone = typer.Typer(add_completion=False)
    alone.command()(function)
    return list(typer.main.get_command(alone).params)


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
                refuse(printable(f"safemerge: {error}"))
                raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Verbs,
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
    note(f"note: {str(message).removeprefix('safemerge: ')}")
