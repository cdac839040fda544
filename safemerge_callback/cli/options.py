"""What several verbs take, and what they show while they work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

SubspaceFile = Annotated[Path, typer.Option("--subspace", "-s", help="Subspace file, from `safemerge build`.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Bar = Annotated[bool, typer.Option(help="Show progress on stderr.")]

GateName = Annotated[
    str | None,
    typer.Option(
        help="threshold, calibrated, reference, num_layers, quantile, gap, all or random. "
        "[default: threshold, or the one whose knob is given]"
    ),
]
Threshold = Annotated[float, typer.Option(help="Merge modules whose cosine is below it.")]
NumLayers = Annotated[int | None, typer.Option(help="Merge that many modules of lowest cosine.")]
Quantile = Annotated[float | None, typer.Option(help="Merge that share of the modules, of lowest cosine.")]
ZThreshold = Annotated[
    float | None, typer.Option(help="Merge below so many standard deviations from an unrelated update's cosine.")
]
ReferenceFraction = Annotated[
    float | None, typer.Option(help="Merge below this fraction of the safety adapter's own cosine.")
]
Seed = Annotated[int, typer.Option(help="What gate random and the masks of random methods are drawn by.")]
Soft = Annotated[bool, typer.Option("--soft", help="Let the weights fade in below the gate.")]
Density = Annotated[float | None, typer.Option(help="Share of entries kept by methods that prune.")]
MajoritySign = Annotated[str, typer.Option(help="Sign election: total or frequency.")]


@contextmanager
def working(what: str, shown: bool) -> Iterator[None]:
    """Show a moving mark on stderr while one long call runs; nothing where stderr is no terminal."""
    if not shown:
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)):
        yield


def targets(text: str | None) -> list[str] | str | None:
    """Return a list where all parts between commas are plain names, else one regular expression."""
    names = [part.strip() for part in (text or "").split(",")]
    return names if text and all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def gate_options(gate: str | None, **knobs: Any) -> dict[str, Any]:
    """Return `gate` and the knobs that were given; without `gate`, the one whose own knob was, or threshold."""
    from ..decision import KNOB

    given = {name: value for name, value in knobs.items() if value is not None}
    named = (name for name, knob in KNOB.items() if name != "threshold" and knob in given)
    return {"gate": gate or next(named, "threshold"), **given}


def device_named(name: str) -> str:
    """Return `name` where tensors can be made there; ConfigError where not."""
    import torch

    from ..errors import ConfigError

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}") from error
    return name
