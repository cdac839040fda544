"""The one registry: a correction is a file, and its file name is its name in YAML."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from ..errors import ConfigError, nearest, shown
from ..io.choices import one_of
from ..live.engine import ENGINES
from ..record.metrics import Metric
from .merge import MERGE
from .protocol import Batchwise, Correction, GradientTerm, PassSeries, Term

# What a run can open for a correction.
NEEDS = frozenset({"subspace", "safety_adapter"})

Maker = TypeVar("Maker", bound=Callable[..., Any])


@dataclass(frozen=True)
class CorrectionKind:
    """A correction that a run may have: what makes one, of its settings, what it needs, and what it costs.

    `make(settings)` gives a `Correction`, a `GradientTerm`, a `PassSeries` or a `Batchwise`, a new one for each run.
    `settings`: a dataclass that checks itself when made. `needs`: what must be there of `NEEDS`; `engines`: those of
    `ENGINES` that it can serve; `cost`: in words, in forward and backward passes; `deed`: what it does to a run, in
    words that `in 60 steps` may follow; `figures`: what one that is no change tells of itself, by name.
    """

    name: str
    make: Callable[[Any], Correction | Term | Batchwise]
    settings: type
    needs: frozenset[str]
    engines: frozenset[str]
    cost: str
    deed: str
    figures: Mapping[str, Metric]

    def counts(self, setting: str) -> bool:
        """Return whether a setting's list is never published, its number of rows in its place (metadata `counted`)."""
        return any(f.name == setting and f.metadata.get("counted") for f in fields(self.settings))


class ChosenCorrection(NamedTuple):
    """A correction with its settings, as a run will have it."""

    kind: CorrectionKind
    settings: Any

    def for_run(self, engine: str, max_steps: int) -> Correction | Term | Batchwise:
        """Return a new one, for one run of `max_steps` by this engine, one of `ENGINES`.

        ConfigError where the engine cannot serve it, where it would never be due, and for what is no correction.
        """
        name, instance = self.kind.name, self.kind.make(self.settings)
        if not isinstance(instance, Correction | GradientTerm | PassSeries | Batchwise):
            raise ConfigError(
                f"correction {name!r} made a {type(instance).__name__}, which is neither a change nor a gradient term: "
                "let it have a name, a schedule, and a method `change` or `batches`, or a weight and a method `loss` "
                "or `passes`"
            )
        if engine not in self.kind.engines:
            raise ConfigError(
                f"correction {name!r} serves {sorted(self.kind.engines)}, and this training is under {engine}: train "
                "with one of those, or leave it out"
            )
        schedule = instance.schedule
        if not schedule.ever(max_steps):
            raise ConfigError(
                f"correction {name!r} is never due in this run of {max_steps} steps ({schedule}): choose them so that "
                "it is, or leave it out"
            )
        return instance


CORRECTIONS: dict[str, CorrectionKind] = {}


def correction(
    settings: type,
    *,
    cost: str,
    deed: str = "",
    figures: Mapping[str, Metric] = MappingProxyType({}),
    needs: Collection[str] = (),
    engines: Collection[str] = ENGINES,
) -> Callable[[Maker], Maker]:
    """Enter what makes a correction under its own name; the arguments are the fields of `CorrectionKind`.

    Without a `deed` cards say that it was at work. ValueError for a need or an engine that there is not.
    """
    if unknown := (set(needs) - NEEDS) | (set(engines) - set(ENGINES)):
        raise ValueError(f"{sorted(unknown)} are no needs of {sorted(NEEDS)} and no engines of {list(ENGINES)}")

    def enter(make: Maker) -> Maker:
        name = make.__name__
        CORRECTIONS[name] = CorrectionKind(
            name, make, settings, frozenset(needs), frozenset(engines), cost, deed or f"{name} was at work", figures
        )
        return make

    return enter


def chosen_corrections(entries: Any) -> list[ChosenCorrection]:
    """Return the corrections of a list as YAML has it, each a mapping of a name to its settings.

    ConfigError for anything else, for an unknown name or setting with the nearest there is, for a setting that its
    correction refuses, and for one that stands there twice. A merge is no entry here: its settings are those beside.
    """
    chosen = [_chosen(*named) for named in named_entries(entries)]
    names = [one.kind.name for one in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"corrections name {twice[0]!r} twice: give it once")
    return chosen


def place_of(setting: str) -> str:
    """Return how a setting that a correction has is given, the end of a sentence; empty where none has it.

    Such as `'rows' of correction 'replay' is given as corrections=[{'replay': {'rows': ...}}]`.
    """
    names = [name for name, kind in CORRECTIONS.items() if setting in {f.name for f in fields(kind.settings)}]
    if not names:
        return ""
    if len(names) == 1:
        return (
            f"{setting!r} of correction {names[0]!r} is given as corrections=[{{{names[0]!r}: {{{setting!r}: ...}}}}]"
        )
    return f"{setting!r} of corrections {names} is given as corrections=[{{NAME: {{{setting!r}: ...}}}}]"


def plain(chosen: Iterable[ChosenCorrection]) -> list[dict[str, Any]]:
    """Return the list that gives these corrections, every setting told."""
    return [{one.kind.name: asdict(one.settings)} for one in chosen]


def named_entries(entries: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return name and settings of each entry of a list; ConfigError for anything else. Names may be unknown."""
    if not isinstance(entries, list | tuple):
        raise ConfigError(
            f"corrections is {shown(entries)}: give a list, each entry a correction's name and its settings"
        )
    return [_entry(one) for one in entries]


def _entry(one: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(one, Mapping) or len(one) != 1:
        raise ConfigError(
            f"corrections hold {shown(one)}: give each entry as one name and its settings, as {{name: {{every: 2}}}}"
        )
    ((name, knobs),) = one.items()
    if knobs is not None and not isinstance(knobs, Mapping):
        raise ConfigError(f"correction {shown(name)} is given {shown(knobs)}: give its settings, or {{}} for none")
    return name, dict(knobs or {})


def _chosen(name: str, knobs: Mapping[str, Any]) -> ChosenCorrection:
    kind = CORRECTIONS.get(one_of(name, sorted([*CORRECTIONS, MERGE]), "correction"))
    if kind is None:
        raise ConfigError(
            "corrections hold a merge, whose settings stand by themselves in a SafeMergeConfig: give them so, or make "
            "the config with SafeMergeConfig.from_dict or from_yaml"
        )
    allowed = [f.name for f in fields(kind.settings)]
    for key in knobs:
        if key not in allowed:
            raise ConfigError(
                f"correction {name!r}: setting {shown(key)} is unknown"
                f"{nearest(key, allowed, then=f'choose among {allowed}')}"
            )
    try:
        return ChosenCorrection(kind, kind.settings(**knobs))
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"correction {name!r}: {error}") from error
