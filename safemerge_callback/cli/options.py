"""What several verbs take, and what they show while they work."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..io.bars import bars_shown
from .app import Verb

SubspaceFile = Annotated[
    str,
    typer.Option("--subspace", "-s", help="Subspace: file of `safemerge build`, or Hub id."),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Bar = Annotated[bool, typer.Option(help="Show progress on stderr.")]

GateName = Annotated[
    str | None,
    typer.Option(
        help="threshold, calibrated, reference, opposed, num_layers, quantile, gap, safety_slope, gradient_norm, all "
        "or random. [default: all, or the one whose knob is given]"
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(help="auto (linear with a safety adapter, pull without), cat (ranks add), ties, ... [default: auto]"),
]
AllowEmpty = Annotated[
    bool | None, typer.Option("--allow-empty", help="Exit with 0 even if the gate selects no module.")
]
Baked = Annotated[
    str | None, typer.Option(help="Base model: write a full checkpoint, the merged adapter added to its weights.")
]
TaskRows = Annotated[
    str | None, typer.Option(help="Rows of the task, where gate or method ask the model: .jsonl, .csv, .json.")
]
SafetyRows = Annotated[str | None, typer.Option(help="Safety rows for the same, as `safemerge harvest` writes them.")]
AskedModel = Annotated[str | None, typer.Option("--base", help="Model that is asked. [default: the adapter's base]")]
Threshold = Annotated[
    float | None,
    typer.Option(help="Merge modules whose cosine is below it: gate threshold. [default of that gate: 0.35]"),
]
NumLayers = Annotated[int | None, typer.Option(help="Merge that many modules of lowest cosine.")]
Quantile = Annotated[float | None, typer.Option(help="Merge that share of the modules, of lowest cosine.")]
ZThreshold = Annotated[
    float | None, typer.Option(help="Merge below so many standard deviations from an unrelated update's cosine.")
]
ReferenceFraction = Annotated[
    float | None, typer.Option(help="Merge below this fraction of the safety adapter's own cosine.")
]
Seed = Annotated[
    int | None, typer.Option(help="What gate random and the masks of random methods are drawn by. [default: 0]")
]
Soft = Annotated[bool | None, typer.Option("--soft", help="Let the weights fade in below the gate.")]
Space = Annotated[
    str | None,
    typer.Option(
        help="delta: sum of the updates; factor: PEFT's sum of the factors; aligned_factor: of aligned ones. "
        "[default: delta]"
    ),
]
ManyWeights = Annotated[
    str | None, typer.Option(help="Of the fine-tuned update and of each safety update. [default: 0.8 0.2]")
]
Strength = Annotated[
    float | None, typer.Option(help="Share of the way that pull goes, or of the overlap that orthogonal takes out.")
]
Operator = Annotated[str | None, typer.Option(help="What method project multiplies with: safelora or orthogonal.")]
OperatorRank = Annotated[int | None, typer.Option(help="Rank of operator orthogonal.")]
Density = Annotated[float | None, typer.Option(help="Share of entries kept by methods that prune.")]
MajoritySign = Annotated[str | None, typer.Option(help="Sign election: total or frequency. [default: total]")]
# Which there are is not written out: that would load torch, and helps nobody who has registered one.
ManyKnobs = Annotated[
    list[str] | None,
    typer.Option(
        "--knob",
        metavar="NAME=VALUE",
        help="Any other knob that a method, gate or weights rule declares, such as module_weights, its value as in "
        "YAML; once for each. An unknown name tells which there are.",
    ),
]


class WithWeights(Verb):
    """A command whose `--weights` takes as many numbers as follow it: `0.8 0.2`, `0.8/0.2` and `0.8,0.2` are one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the numbers after `--weights` before the options are read."""
        joined: list[str] = []
        for word in args:
            before = joined[-1] if len(joined) > 1 and joined[-2] == "--weights" else ""
            if before and _is_number(word) and _is_number(before.rpartition("/")[2]):
                joined[-1] = f"{before}/{word}"
            else:
                joined.append(word)
        parsed: list[str] = super().parse_args(ctx, joined)
        return parsed


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def weights_of(text: str | None) -> list[float] | None:
    """Return the numbers of one set of weights, `/`, commas or blanks between; ConfigError for anything else."""
    return None if text is None else [_number(part, "weights") for part in re.split(r"[/,\s]+", text.strip())]


def weights_listed(text: str) -> list[list[float]]:
    """Return sets of weights, commas between one and the next: `0.9/0.1,0.8/0.2`."""
    return [[_number(part, "weights") for part in one.split("/")] for one in names_listed(text)]


def knobs_of(words: list[str] | None, options: dict[str, Any], known: tuple[str, ...], what: str) -> dict[str, Any]:
    """Return the knobs of `--knob`, each a name and a YAML value.

    `options`: those that were given by themselves; `known`: what is declared, for `what`. ConfigError for a knob
    without a value, one that stands twice, and one that nothing has declared.
    """
    from ..errors import ConfigError
    from ..io.documents import parse_yaml
    from ..io.knobs import unknown_knob

    knobs: dict[str, Any] = {}
    for word in words or []:
        name, equals, text = word.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"knob {word!r} has no value: give it as NAME=VALUE, such as --knob density=0.5")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise unknown_knob(name, known, what)
        if name in knobs or name in options:
            raise ConfigError(f"knob {name!r} is given twice: give it once")
        knobs[name] = parse_yaml(text, f"knob {name!r}, {text!r},")
    return knobs


def align_of(text: str | None) -> float | dict[str, float]:
    """Return one number, or those of patterns: `1.1`, or `v_proj=1.2,o_proj=1.1`; 1 where there is no text."""
    if text is None:
        return 1.0
    if "=" not in text:
        return _number(text, "align")
    pairs = [part.rpartition("=") for part in names_listed(text)]
    return {pattern: _number(number, "align") for pattern, _, number in pairs}


def refuse_idle(context: typer.Context, who: str, names: Collection[str]) -> None:
    """Raise ConfigError for an option among these that was given, even as its default: it has no effect on `who`."""
    from ..errors import ConfigError

    for option in context.command.params:
        if option.name in names and is_on_command_line(context, str(option.name)):
            raise ConfigError(f"{option.opts[0]} has no effect on {who}: drop it")


def is_on_command_line(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, be it as its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def names_listed(text: str) -> list[str]:
    """Return the parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, what: str) -> float:
    from ..errors import ConfigError

    if not _is_number(text):
        raise ConfigError(f"{what}: {text!r} is no number, give some such as 0.8/0.2")
    return float(text)


def gates_named(thresholds: str | None, gates: str | None) -> list[Any]:
    """Return the gates of a sweep: one a threshold, and those named, each with the value of its knob after `=`."""
    from ..decision import GATES, KNOB, Gate, as_gate
    from ..errors import ConfigError

    if thresholds is None and gates is None:
        from ..offline.sweep.sweep import DEFAULT_GATES

        return list(DEFAULT_GATES)
    all_gates = [Gate(threshold=_number(text, "thresholds")) for text in names_listed(thresholds or "")]
    for word in names_listed(gates or ""):
        name, _, text = word.partition("=")
        value: dict[str, Any] = {}
        if text:
            if name not in KNOB:
                Gate(name)
                raise ConfigError(f"gates: {word!r} has a value, and gate {name!r} has no knob: give {name}")
            number = _number(text, f"gates: {name}")
            value = {KNOB[name]: int(number) if GATES[name].counts and number.is_integer() else number}
        all_gates.append(as_gate(name, value))
    return all_gates


@contextmanager
def working(what: str, shown: bool) -> Iterator[None]:
    """Show a moving mark on stderr while one long call runs; nothing where stderr is no terminal."""
    if not (shown and bars_shown()):
        yield
        return
    from rich.console import Console
    from rich.text import Text

    from ..io.printable import printable

    with Console(stderr=True).status(Text(printable(what))):
        yield


def targets(text: str | None) -> list[str] | str | None:
    """Return a list where all parts between commas are plain names, else one regular expression."""
    names = [part.strip() for part in (text or "").split(",")]
    return names if text and all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def gate_options(gate: str | None, **knobs: Any) -> dict[str, Any]:
    """Return `gate` and the knobs that were given; without `gate`, `default_gate`."""
    from ..decision import default_gate

    values = {name: value for name, value in knobs.items() if value is not None}
    return {"gate": gate or default_gate(values), **values}


def device_named(name: str) -> str:
    """Return `name` where tensors can be made there; ConfigError where not."""
    import torch

    from ..errors import ConfigError

    try:
        # Read back: the device `meta` takes all tensors and holds none.
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}") from error
    return name
