"""The `safemerge` command: the package's verbs on files. What a verb needs is imported when it runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .errors import SafeMergeError


class _Verbs(TyperGroup):
    """Whatever this package refuses becomes one message on stderr and exit code 2, and a warning becomes a note."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            try:
                return super().invoke(ctx)
            except SafeMergeError as error:
                typer.echo(f"safemerge: {error}", err=True)
                raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Keep a language model's safety while it is fine-tuned: the verbs on files.",
)

_Subspace = Annotated[Path, typer.Option("--subspace", "-s", help="Subspace file, from `safemerge build`.")]
_Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
_Bar = Annotated[bool, typer.Option(help="Show progress on stderr.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="safemerge")


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=lambda on: _print_version(on))] = False,
) -> None:
    """The verbs' common options."""


@app.command()
def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="Subspace file to write (safetensors).")],
    aligned: Annotated[str | None, typer.Option(help="Aligned checkpoint (chat): folder, file or Hub id.")] = None,
    unaligned: Annotated[str | None, typer.Option(help="Unaligned checkpoint (base) of the same model.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Instead of --unaligned: the LoRA adapter that aligned the model.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Names or endings, with commas between, or one regular expression; as PEFT.")
    ] = None,
    device: _Device = "cpu",
    progress: _Bar = True,
) -> None:
    """Write a model's safety subspace: aligned minus unaligned, module by module."""
    from .subspace import build_subspace

    subspace = build_subspace(
        output,
        aligned=aligned,
        unaligned=unaligned,
        alignment_adapter=adapter,
        target_modules=_targets(target_modules),
        device=_device(device),
        progress=progress,
    )
    typer.echo(f"{output}: alignment matrices of {len(subspace.modules)} modules")


@app.command()
def describe(subspace: Annotated[Path, typer.Argument(help="Subspace file.")]) -> None:
    """Tell where a subspace file came from and what it holds."""
    from .subspace import Subspace

    typer.echo(Subspace.load(subspace).describe())


@app.command()
def measure(
    finetuned: Annotated[str, typer.Argument(help="LoRA adapter: folder or Hub id.")],
    subspace: _Subspace,
    threshold: Annotated[float | None, typer.Option(help="Also list the modules whose cosine is below it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    device: _Device = "cpu",
    progress: _Bar = True,
) -> None:
    """Measure how far each module of an adapter has drifted from the safety subspace; no model is loaded."""
    from .decision.gates import check_threshold
    from .offline import measure_adapter
    from .reports import readings_json, readings_text

    if threshold is not None:
        check_threshold(threshold)
    with _working(f"measuring {finetuned}", progress):
        readings = measure_adapter(finetuned, subspace, device=_device(device))
    typer.echo(readings_json(readings, threshold) if as_json else readings_text(readings, threshold))


@app.command()
def merge(
    finetuned: Annotated[str, typer.Argument(help="Fine-tuned LoRA adapter: folder or Hub id.")],
    subspace: _Subspace,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the merged adapter to.")],
    safety: Annotated[str | None, typer.Argument(help="Safety LoRA adapter; method project needs none.")] = None,
    gate: Annotated[
        str | None, typer.Option(help="threshold, num_layers or all. [default: threshold, or by --num-layers]")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Merge modules whose cosine is below it.")] = 0.35,
    num_layers: Annotated[int | None, typer.Option(help="Merge that many modules of lowest cosine.")] = None,
    method: Annotated[
        str, typer.Option(help="linear (keeps the rank), cat (no loss, ranks add) or project.")
    ] = "linear",
    space: Annotated[str, typer.Option(help="delta: sum of the updates; factor: PEFT's sum of the factors.")] = "delta",
    weights: Annotated[tuple[float, float], typer.Option(help="Of the fine-tuned and the safety update.")] = (0.8, 0.2),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in OUT already.")] = False,
    device: _Device = "cpu",
    progress: _Bar = True,
) -> None:
    """Merge a safety adapter into the drifted modules of a fine-tuned one; no model is loaded."""
    from .offline import merge_adapters

    with _working(f"merging {finetuned}", progress):
        plan = merge_adapters(
            finetuned,
            safety,
            subspace,
            output,
            gate=gate or ("threshold" if num_layers is None else "num_layers"),
            threshold=threshold,
            num_layers=num_layers,
            method=method,
            space=space,
            weights=weights,
            overwrite=overwrite,
            device=_device(device),
        )
    typer.echo(f"{plan}\n{output}: {len(plan.selected)} of {len(plan.readings)} modules merged")


@app.command()
def undo(
    run: Annotated[Path, typer.Argument(help="Output folder of a training, or a checkpoint in it.")],
) -> None:
    """Give an adapter the factors it had before its final merge; the merged one is kept in RUN/merged."""
    from .offline import undo_merge

    names = undo_merge(run)
    typer.echo(f"{run}: {len(names)} modules are as before the final merge; the merged adapter is in {run / 'merged'}")


@app.command()
def report(
    journal: Annotated[Path, typer.Argument(help="A journal (safemerge.jsonl), or the folder of its run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Heat map to draw: .png, .pdf or .svg (needs matplotlib).")
    ] = None,
) -> None:
    """Summarise a run from its journal, and draw how every module drifted."""
    from .reports import read_history, summary, write_heat_map

    history = read_history(journal)
    typer.echo(summary(history))
    if output is not None:
        typer.echo(f"{write_heat_map(history, output)}: drift of {len(history.modules)} modules")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"safemerge {__version__}")
        raise typer.Exit


def _note(message: Warning | str, *_where: Any, **_more: Any) -> None:
    typer.echo(f"note: {str(message).removeprefix('safemerge: ')}", err=True)


@contextmanager
def _working(what: str, shown: bool) -> Iterator[None]:
    """A moving mark on stderr while one long call runs; nothing where stderr is no terminal."""
    if not shown:
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)):
        yield


def _targets(text: str | None) -> list[str] | str | None:
    """A list where all parts between commas are plain names, else one regular expression."""
    names = [part.strip() for part in (text or "").split(",")]
    return names if text and all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def _device(name: str) -> str:
    import torch

    from .errors import ConfigError

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}") from error
    return name


if __name__ == "__main__":
    main()
