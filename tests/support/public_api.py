"""The public names with their signatures and the verbs with their options, as the lines of tests/public_api.txt.

    python -m tests.support.public_api

writes that file anew. Whoever reads the difference sees what an update would break.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safemerge_callback

FILE = Path(__file__).parents[1] / "public_api.txt"
HEAD = "# Written by `python -m tests.support.public_api`: what an update must not break (docs/deprecation.md)."


def api_lines() -> list[str]:
    """Return a line a name, a member and a verb."""
    names = sorted(set(safemerge_callback.__all__) - {"__version__"})
    return [HEAD, *(line for name in names for line in lines_of(name, getattr(safemerge_callback, name))), *verbs()]


def lines_of(name: str, thing: Any) -> Iterator[str]:
    """The line of a function; of a class that of its constructor, and one a public member that no foreign base has."""
    yield f"{name}{signature(thing)}"
    if not inspect.isclass(thing):
        return
    foreign = {member for base in thing.__mro__ if not _is_ours(base) for member in dir(base)}
    for member in sorted(set(dir(thing)) - foreign):
        if not member.startswith("_"):
            value = inspect.getattr_static(thing, member)
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            yield f"{name}.{member}{signature(value) if inspect.isfunction(value) else ''}"


def signature(thing: Any) -> str:
    """Return arguments, defaults and what is returned, as written; no address of an object, which differs each time."""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):  # an exception's is its base's, in C
        return ""
    return re.sub(r" at 0x[0-9a-f]+", "", text).replace("'", "")


def verbs() -> Iterator[str]:
    """Each verb of the command line with its arguments and options."""
    from typer.main import get_command

    from safemerge_callback.cli import app

    commands: Any = get_command(app)
    for verb, command in sorted(commands.commands.items()):
        places = [one.name.upper() for one in command.params if one.param_type_name == "argument"]
        options = [one for one in command.params if one.param_type_name == "option"]
        yield " ".join(["safemerge", verb, *places, *sorted("/".join([*x.opts, *x.secondary_opts]) for x in options)])


def _is_ours(base: type) -> bool:
    return base.__module__.partition(".")[0] == "safemerge_callback"


if __name__ == "__main__":
    FILE.write_text("\n".join(api_lines()) + "\n", encoding="utf-8")
