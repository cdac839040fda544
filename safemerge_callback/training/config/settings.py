"""Every knob of the callback, once, and what it means; what it may be is in `checks`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ...corrections.registry import CORRECTIONS, ChosenCorrection, CorrectionKind, chosen_corrections, place_of
from ...decision import DEFAULT_GATE, GATES, Gate, gate_of
from ...decision.weights.by_pattern import MODULE_WEIGHTS
from ...errors import ConfigError, nearest, shown
from ...io.addresses import source_name
from ...io.documents import read_yaml
from ...io.paths import existing
from ...methods import METHODS, How
from ...methods.aliases import without_alias
from ...methods.density import DENSITY, MAJORITY_SIGN
from ...methods.how import AUTO
from ...methods.project import OPERATOR, OPERATOR_RANK
from .checks import adapters_of, checked_settings, join_knobs
from .choices import declared_knobs, gate_at, how_of, rules_of
from .shorthands import OF_THE_RUN, with_merge_entry, with_preset


def _listed(names: Iterable[str]) -> str:
    *names, last = names
    return f"{', '.join(names)} or {last}"


@dataclass(repr=False)
class SafeMergeConfig:
    """The settings of a `SafeMergeCallback`, checked when made; ConfigError says which value and what is allowed.

    The types are plain, so `HfArgumentParser` and `TrlParser` take the class as it is.
    """

    subspace: str | None = field(
        default=None,
        metadata={
            "help": "Safety subspace of the base model: a file of `safemerge build`, or a Hub id; without one nothing "
            "is measured or merged."
        },
    )
    # In this order HfArgumentParser takes any number of names; a file may hold one name or a list.
    safety_adapter: list[str] | None | str = field(  # noqa: RUF036
        default=None, metadata={"help": "Folder or Hub id of the safety LoRA that is merged in, or a list of them."}
    )
    # In docs/results.md modules of low cosine kept no more refusals than as many at random.
    gate: str = field(default=DEFAULT_GATE, metadata={"help": f"Which modules to merge: {_listed(GATES)} (none)."})
    threshold: float = field(
        default=0.35, metadata={"help": "Gate threshold merges the modules whose cosine is below this."}
    )
    num_layers: int | None = field(
        default=None, metadata={"help": "How many modules, those of lowest cosine, gate num_layers merges."}
    )
    z_threshold: float = field(
        default=Gate.z_threshold,
        metadata={
            "help": "Gates calibrated and opposed merge below so many standard deviations from an unrelated update's "
            "cosine, opposed from its signed one, which is 0."
        },
    )
    reference_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Gate reference merges below this fraction of the safety adapter's own cosine in the module."
        },
    )
    quantile: float | None = field(
        default=None, metadata={"help": "Which share of the modules, those of lowest cosine, gate quantile merges."}
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of whatever is drawn: the modules of gate random, the masks of random methods."},
    )
    rearm: float | None = field(
        default=None,
        metadata={"help": "How far above the gate a merged module must be seen before it is merged again."},
    )
    min_task_weight: float = field(
        default=0.0,
        metadata={"help": "Share of the task's update that all merges together must leave in every module."},
    )
    soft: bool = field(
        default=False,
        metadata={"help": "Whether weights fade in, from no change at the gate to the asked weights at a cosine of 0."},
    )
    spread_weights: bool = field(
        default=False, metadata={"help": "Whether the weights are the run's total, shared out over its merge events."}
    )
    method: str = field(
        default=AUTO,
        metadata={
            "help": f"How two updates become one: {AUTO} (linear with a safety adapter, pull without), "
            f"{_listed(sorted(name for name, method in METHODS.items() if method.keeps_rank))}."
        },
    )
    space: str = field(
        default="delta",
        metadata={
            "help": "What is summed: delta (the updates, exact), factor (A and B, as PEFT), or aligned_factor (A and B "
            "of rank directions that fit each other)."
        },
    )
    weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of the task's update and of each safety update, 0.8 and 0.2 where there is one; a "
            "negative one takes an update away."
        },
    )
    module_weights: dict[str, list[float]] | str | None = field(default=None, metadata={"help": MODULE_WEIGHTS.help})
    strength: float | None = field(
        default=None,
        metadata={
            "help": "Share of the way that pull (0.2 if left out) and ema (1) go to their target, and of the overlap "
            "that orthogonal takes out (1); at most 1."
        },
    )
    operator: str | None = field(default=None, metadata={"help": OPERATOR.help})
    operator_rank: int | None = field(default=None, metadata={"help": OPERATOR_RANK.help})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Share of the average that ema keeps when it takes an update in; 0.9 if left out."},
    )
    ema_every: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps from one update taken into ema's average to the next; 10 if left out."},
    )
    density: float | None = field(default=None, metadata={"help": DENSITY.help})
    majority_sign_method: str = field(default=MAJORITY_SIGN.default, metadata={"help": MAJORITY_SIGN.help})
    knobs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Knobs of methods, gates and weights rules that are no setting here, as {name: value}; as keywords "
            "and in YAML they stand by themselves."
        },
    )
    # Six checks a run, whatever its length: what docs/results.md has figures of. A little over a sixth, so that the
    # last one is the final one and none comes just before it.
    every: float = field(
        default=0.167,
        metadata={
            "help": "Optimizer steps from one check to the next, or, below 1, a share of the run's steps; 0 for none "
            "before the end."
        },
    )
    from_step: int = field(default=0, metadata={"help": "First optimizer step at which a periodic check may happen."})
    until_step: int | None = field(
        default=None, metadata={"help": "Last optimizer step at which a periodic check may happen."}
    )
    cooldown: int = field(default=0, metadata={"help": "Optimizer steps after a merge in which checks only measure."})
    at_train_end: bool = field(
        default=True, metadata={"help": "Whether to check, and merge, once more when training ends."}
    )
    optimizer_state: str = field(
        default="keep",
        metadata={"help": "What becomes of the optimizer's moments of merged modules: keep, reset or rescale."},
    )
    adapter_name: str | None = field(
        default=None, metadata={"help": "Name of the live LoRA adapter, where a model holds more than one."}
    )
    placement: str = field(
        default="auto",
        metadata={"help": "Where alignment matrices stay: auto, device, host, disk, or sharded over the processes."},
    )
    asynchronous: bool = field(
        default=False,
        metadata={"help": "Whether a periodic check measures beside the next optimizer step, and merges after it."},
    )
    journal: str | None = field(
        default=None, metadata={"help": "Path of the journal; by default safemerge.jsonl in the output folder."}
    )
    quiet: bool = field(
        default=False, metadata={"help": "Whether to keep the lines off the terminal; warnings are shown all the same."}
    )
    wandb_chart: str | None = field(
        default=None, metadata={"help": "Saved W&B chart, as ENTITY/NAME, that the heat map is shown with."}
    )

    data: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Rows for gates, methods and weights rules that ask the live model, as {safety_rows: FILE, "
            "num_task_rows: 64}."
        },
    )
    corrections: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "What else is done to the run: a list, each entry a correction's name and its settings, or a YAML "
            "file with one; replay, where there is neither a list nor a subspace."
        },
    )

    def __post_init__(self) -> None:
        settings = {f.name: f.default for f in fields(self)}
        for name, value in checked_settings(vars(self), settings).items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafeMergeConfig:
        """Make a config from a mapping; ConfigError for a key that is no setting, with the nearest that is.

        `combination_type` is taken as PEFT's alias of `method` and `space`, and `preset` as the settings of a paper,
        one of `PRESETS`, which those given beside it go before. An entry `merge` of `corrections` holds settings that
        may stand by themselves as well, all in one place or the other. Without `gate` it is the one whose own knob is
        given. A knob that a method, a gate or a weights rule has declared, and that is no setting, is one of `knobs`.
        """
        knobs = with_preset(without_alias(with_merge_entry(dict(values))))
        knobs.setdefault("gate", gate_of(knobs, cls.gate))
        allowed = [f.name for f in fields(cls)]
        singles = {key: knobs.pop(key) for key in declared_knobs(allowed) if key in knobs}
        if singles:
            knobs["knobs"] = join_knobs(knobs.get("knobs"), singles)
        for key in knobs:
            if key not in allowed:
                place = place_of(key) if isinstance(key, str) else ""
                advice = f"; {place}" if place else nearest(str(key), allowed, then=f"choose among {allowed}")
                raise ConfigError(f"setting {key!r} is unknown{advice}")
        return cls(**knobs)

    @classmethod
    def from_yaml(cls, path: str | Path) -> SafeMergeConfig:
        """Make a config from a YAML file that maps settings to values; ConfigError as `from_dict`."""
        values = read_yaml(path, f"config file {shown(path)}", advice="Give a YAML file of settings")
        if not isinstance(values, dict):
            raise ConfigError(
                f"config file {str(path)!r} holds {type(values).__name__}: it must map settings to values"
            )
        return cls.from_dict(values)

    def __repr__(self) -> str:
        """The settings that are not the defaults, as the call that makes an equal one."""
        return f"SafeMergeConfig({', '.join(f'{name}={value!r}' for name, value in self.chosen.items())})"

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings in force that differ from what they are by default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def words(self) -> str:
        """The settings that are not the defaults, for a card: without those that hold a path of this machine, or rows.

        Of a correction those that are not its own defaults.
        """
        paths = ("subspace", "safety_adapter", "journal", "data", "corrections")
        plain = [f"{name} {value}" for name, value in self.chosen.items() if name not in paths]
        return ", ".join([*plain, *map(_chosen_words, self.chosen_corrections)])

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as a JSON-able dict that `from_dict` takes back.

        Of `corrections`, `data` and `knobs` only where there are any.
        """
        extra = ("corrections", "data", "knobs")
        return {name: value for name, value in asdict(self).items() if name not in extra or value is not None}

    def to_publish(self) -> dict[str, Any]:
        """Return every setting as `to_dict`, with names in the place of this machine's paths."""
        return public_settings(self.to_dict())

    @property
    def how(self) -> How:
        """The method with its knobs."""
        return how_of(vars(self))

    @property
    def rules(self) -> dict[str, Any]:
        """The knobs of the weights rules."""
        return rules_of(vars(self))

    def gate_at(self, step: int = 0) -> Gate:
        """The gate with its knobs, as it decides at optimizer step `step`."""
        return gate_at(vars(self), step)

    @property
    def adapters(self) -> list[str]:
        """The safety adapters, none, one or several."""
        return adapters_of(self.safety_adapter)

    @property
    def chosen_corrections(self) -> list[ChosenCorrection]:
        """The corrections that the list names, with their settings."""
        return chosen_corrections(self.corrections or [])

    @property
    def measures(self) -> bool:
        """Whether there are checks: what they measure with is the subspace."""
        return self.subspace is not None

    @property
    def merges(self) -> bool:
        """Whether any check may change the model; False for gate watch."""
        return self.measures and GATES[self.gate].merges

    @property
    def changes(self) -> bool:
        """Whether anything may change the model: a check, or another correction."""
        return self.merges or self.corrections is not None


def resolve_config(config: SafeMergeConfig | str | PathLike[str] | None, knobs: Mapping[str, Any]) -> SafeMergeConfig:
    """Return `config`, or one made of keywords, a path in its place being the subspace's.

    ConfigError for a config beside keywords, two subspaces, or another type.
    """
    if config is None:
        return SafeMergeConfig.from_dict(knobs)
    # A YAML file is meant as the settings, and is no subspace.
    if isinstance(config, str | PathLike) and Path(config).suffix not in (".yaml", ".yml"):
        if "subspace" in knobs:
            raise ConfigError(f"subspace was given twice, {str(config)!r} and {str(knobs['subspace'])!r}: give one")
        return SafeMergeConfig.from_dict({"subspace": config, **knobs})
    if not isinstance(config, SafeMergeConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}: give a SafeMergeConfig, SafeMergeConfig.from_yaml(path), the path "
            "of a subspace, or keywords"
        )
    if knobs:
        raise ConfigError(
            f"settings {sorted(knobs)} were given beside a config: put them into the config, or give no config"
        )
    return config


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with a name for each path: what may be published, and stays when files are moved.

    Without a subspace those of a merge are left out: there is none.
    """
    there = settings if settings.get("subspace") else [name for name in settings if name in ("subspace", *OF_THE_RUN)]
    names = {name: settings[name] for name in there}
    for key in ("subspace", "safety_adapter", "journal"):
        path = settings.get(key)
        names[key] = [source_name(one) for one in path] if isinstance(path, list) else path and source_name(path)
    if settings.get("data"):
        names["data"] = {key: _public(value, key == "safety_rows") for key, value in settings["data"].items()}
    if settings.get("corrections"):
        names["corrections"] = [_published(entry) for entry in settings["corrections"]]
    return {key: value for key, value in names.items() if key in there}


def _chosen_words(one: ChosenCorrection) -> str:
    """A correction and its settings that are not the defaults, as `replay (batch_size 2, rows 3 rows)`."""
    defaults = {f.name: f.default for f in fields(one.kind.settings)}
    chosen = {name: value for name, value in vars(one.settings).items() if value != defaults.get(name)}
    words = ", ".join(f"{name} {_public(value, one.kind.counts(name))}" for name, value in chosen.items())
    return f"{one.kind.name} ({words})" if words else one.kind.name


def _published(entry: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A correction's settings without paths, and without rows that a list holds: their number stands for them."""
    return {name: _published_of(CORRECTIONS.get(name), settings) for name, settings in entry.items()}


def _published_of(kind: CorrectionKind | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one; a checkpoint may name a correction that there is no more."""
    return {key: _public(value, kind is not None and kind.counts(key)) for key, value in settings.items()}


def _public(value: Any, counted: bool = False) -> Any:
    if isinstance(value, list | tuple):
        return f"{len(value)} rows" if counted else [_public(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _public(asdict(value))
    if isinstance(value, Mapping):
        return {key: _public(one) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    # A file may stand behind the kind of its prompts.
    kind, colon, file = value.partition(":")
    if (path := existing(value)) is not None:
        return source_name(path)
    return f"{kind}:{source_name(path)}" if colon and (path := existing(file)) is not None else value
