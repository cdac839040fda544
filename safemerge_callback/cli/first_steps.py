"""The verbs to begin with: what is here and what a model allows, and a first file of settings."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..io.outputs import FileKind, new_output
from .app import Verb, app, examples, note, show

_HEAD = "# Settings of the safety callback for "
_SETTINGS = FileKind("a file of first settings", lambda head: head.startswith(_HEAD.encode()))


@app.command(cls=Verb, epilog=examples("doctor", "doctor MODEL --adapter ADAPTER", "doctor ADAPTER --json"))
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model, or adapter on its base: folder or Hub id.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of that model: folder or Hub id.")] = None,
) -> None:
    """Tell what is installed, what a model and an adapter allow and what is missing, a line each; no model is loaded.

    Exits with 1 where something would be refused.
    """
    from ..offline.diagnosis import diagnosis

    findings = diagnosis(model, adapter)
    fine = all(one.state != "problem" for one in findings)
    show("\n".join(map(str, findings)), {"ok": fine, "findings": findings})
    if not fine:
        raise typer.Exit(1)


@app.command(
    cls=Verb,
    epilog=examples("init ORG/CHAT", "init ORG/CHAT --unaligned ORG/BASE -o safemerge.yaml"),
)
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The aligned model to fine-tune: folder or Hub id.")],
    unaligned: Annotated[
        str | None, typer.Option(help="What it was made from: drift is measured then, and pulled back.")
    ] = None,
    safety_adapter: Annotated[str | None, typer.Option(help="Safety LoRA to merge in place of the pull.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file to write.")] = Path("safemerge.yaml"),
) -> None:
    """Write a first file of settings, and say which commands to run with it; nothing is loaded."""
    from ..io.addresses import address_of
    from ..io.documents import parse_yaml
    from ..training.config.settings import SafeMergeConfig

    if safety_adapter is not None and unaligned is None:
        raise ConfigError("--safety-adapter is merged where drift is measured: give --unaligned, too")
    for source in filter(None, (model, unaligned, safety_adapter)):
        address_of(source, "model", error=ConfigError)
    subspace = f"{Path(model).name.partition('@')[0]}.subspace.safetensors"
    text = first_settings(model, None if unaligned is None else subspace, safety_adapter)
    SafeMergeConfig.from_dict(parse_yaml(text, "the settings"))
    with new_output(output, "output", _SETTINGS) as part:
        part.write_text(text, encoding="utf-8")
    note(f"{output}: written")
    commands = first_commands(model, unaligned, subspace, output)
    calls = [line for line in commands if line.startswith("safemerge ")]
    code = [line for line in commands if line.startswith("callbacks=")]
    show("\n".join(commands), {"output": output, "commands": calls, "code": code})


def first_settings(model: str, subspace: str | None, safety_adapter: str | None) -> str:
    """Return a YAML text of settings: replay without a subspace, else measure, and pull or merge."""
    lines = [f"{_HEAD}{json.dumps(model)}; docs/settings.md has all of them."]
    if subspace is None:
        lines += ["# What the model itself refuses and answers now stands beside each step of its training."]
        lines += ["corrections:", "  - replay: {}"]
    else:
        lines += ["# Drift along the subspace is measured six times a run, and what has drifted is drawn back."]
        lines += [f"subspace: {json.dumps(subspace)}"]
        lines += [] if safety_adapter is None else [f"safety_adapter: {json.dumps(safety_adapter)}"]
        lines += ["# And replay as well:", "# corrections:", "#   - replay: {}"]
    return "\n".join([*lines, ""])


def first_commands(model: str, unaligned: str | None, subspace: str, settings: Path) -> list[str]:
    """Return what to run, in order, each with a word on it; RUN is the output folder of the training."""
    quoted = shlex.quote
    build = f"safemerge build --aligned {quoted(model)} --unaligned {quoted(str(unaligned))} -o {quoted(subspace)}"
    lines = ["# what is missing", f"safemerge doctor {quoted(model)}"]
    lines += [] if unaligned is None else ["# once a model", build]
    return [
        *lines,
        "# in the training",
        f"callbacks=[SafeMergeCallback(SafeMergeConfig.from_yaml({str(settings)!r}))]",
        "# what was done",
        "safemerge report RUN",
        "# does the adapter still refuse, and answer the rest",
        "safemerge gate RUN --min-refused 0.8 --max-over-refused 0.2",
    ]
