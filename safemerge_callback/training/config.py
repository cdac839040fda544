"""Every knob of the callback, once: what it means, what it may be, and one refusal that prints what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..adapters.optimizer import check_optimizer
from ..decision import check_gate, check_merge
from ..errors import ConfigError, nearest
from ..methods import METHODS, Method, get_method
from ..subspace.choice import check_placement

# PEFT's `combination_type` strings, as the two knobs that they are.
COMBINATION_TYPES = {
    "linear": ("linear", "factor"),
    "svd": ("linear", "delta"),
    "linear_svd": ("linear", "delta"),
    "cat": ("cat", "delta"),
}


@dataclass
class SafeMergeConfig:
    """The settings of a `SafeMergeCallback`, checked when made; ConfigError says which value and what is allowed.

    The types are plain, so `HfArgumentParser` and `TrlParser` take the class as it is.
    """

    subspace: str = field(metadata={"help": "Safety-subspace file of the base model, as `safemerge build` writes it."})
    safety_adapter: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the safety LoRA that is merged in."}
    )
    gate: str = field(
        default="threshold", metadata={"help": "Which modules to merge: threshold, num_layers, all, or watch (none)."}
    )
    threshold: float = field(
        default=0.35, metadata={"help": "Gate threshold merges the modules whose cosine is below this."}
    )
    num_layers: int | None = field(
        default=None, metadata={"help": "How many modules, those of lowest cosine, gate num_layers merges."}
    )
    method: str = field(
        default="linear", metadata={"help": "How two updates become one: linear, or project (needs no safety adapter)."}
    )
    space: str = field(
        default="delta", metadata={"help": "What is summed: delta (the updates, exact) or factor (A and B, as PEFT)."}
    )
    weights: list[float] = field(
        default_factory=lambda: [0.8, 0.2], metadata={"help": "Weight of the task's update and of the safety update."}
    )
    every: int = field(
        default=50, metadata={"help": "Optimizer steps from one check to the next; 0 for none before the end."}
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

    def __post_init__(self) -> None:
        _check_types(self)
        _check_gate(self)
        _check_method(self)
        _check_schedule(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafeMergeConfig:
        """Make a config from a mapping; ConfigError for a key that is no setting, with the nearest that is.

        `combination_type` is taken as PEFT's alias of `method` and `space`.
        """
        knobs = _without_alias(dict(values))
        allowed = [f.name for f in fields(cls)]
        for key in knobs:
            if key not in allowed:
                raise ConfigError(f"setting {key!r} is unknown{nearest(str(key), allowed)}: choose among {allowed}")
        if "subspace" not in knobs:
            raise ConfigError(
                "setting 'subspace' is missing: give the safety-subspace file (`safemerge build` makes one)"
            )
        return cls(**knobs)

    @classmethod
    def from_yaml(cls, path: str | Path) -> SafeMergeConfig:
        """Make a config from a YAML file that maps settings to values; ConfigError as `from_dict`."""
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                f"config file {str(path)!r} cannot be read ({error}): give a YAML file of settings"
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"config file {str(path)!r} holds {type(values).__name__}: it must map settings to values"
            )
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as a JSON-able dict that `from_dict` takes back."""
        return asdict(self)

    @property
    def rule(self) -> Method:
        """The merge method that `method` names."""
        return get_method(self.method)

    @property
    def merges(self) -> bool:
        """Whether any check may change the model; False for gate watch."""
        return self.gate != "watch"


def resolve_config(config: SafeMergeConfig | None, knobs: Mapping[str, Any]) -> SafeMergeConfig:
    """Return `config`, or one made of keywords; ConfigError for both, neither, or another type."""
    if config is None:
        return SafeMergeConfig.from_dict(knobs)
    if not isinstance(config, SafeMergeConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}: give a SafeMergeConfig, SafeMergeConfig.from_yaml(path), or keywords"
        )
    if knobs:
        raise ConfigError(
            f"settings {sorted(knobs)} were given beside a config: put them into the config, or give no config"
        )
    return config


def _without_alias(knobs: dict[str, Any]) -> dict[str, Any]:
    """Replace PEFT's `combination_type` by `method` and `space`."""
    if "combination_type" not in knobs:
        return knobs
    alias = knobs.pop("combination_type")
    clash = sorted({"method", "space"} & knobs.keys())
    if clash:
        raise ConfigError(
            f"combination_type {alias!r} was given beside {clash}: it is an alias of both, give one or the other"
        )
    if alias not in COMBINATION_TYPES:
        hint = nearest(str(alias), COMBINATION_TYPES)
        raise ConfigError(f"combination_type {alias!r} is unknown: choose one of {sorted(COMBINATION_TYPES)}{hint}")
    knobs["method"], knobs["space"] = COMBINATION_TYPES[alias]
    return knobs


def _check_types(config: SafeMergeConfig) -> None:
    """Refuse what YAML or a command line may hold by mistake, such as '50' or true where a count is meant."""
    if not isinstance(config.subspace, str | Path) or not str(config.subspace):
        raise ConfigError(f"subspace is {config.subspace!r}: give the path of a safety-subspace file")
    for name in ("subspace", "safety_adapter", "journal"):
        value = getattr(config, name)
        setattr(config, name, str(value) if isinstance(value, Path) else value)
    for name in ("safety_adapter", "journal", "adapter_name"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{name} is {value!r}: give a non-empty string, or leave it out")
    for name in ("every", "from_step", "until_step", "cooldown", "num_layers"):
        value = getattr(config, name)
        optional = value is None and name in ("until_step", "num_layers")
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(f"{name} is {value!r}: give a whole number of 0 or more")
    for name in ("at_train_end", "asynchronous"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} is {getattr(config, name)!r}: give true or false")
    check_placement(config.placement)


def _check_gate(config: SafeMergeConfig) -> None:
    check_gate(config.gate, config.threshold, config.num_layers)
    if config.threshold == 0:
        raise ConfigError(
            "threshold is 0, below which no cosine is: give one above 0, or set gate='watch' to measure only"
        )
    config.threshold = float(config.threshold)


def _check_method(config: SafeMergeConfig) -> None:
    method = get_method(str(config.method))
    if not method.keeps_rank:
        able = sorted(name for name, other in METHODS.items() if other.keeps_rank)
        raise ConfigError(
            f"method {config.method!r} changes the rank, which a live adapter cannot: choose one of {able}, "
            "or merge after training with `safemerge merge`"
        )
    check_optimizer(None, config.optimizer_state)
    config.weights = list(check_merge(config.method, config.space, config.weights))
    if config.weights[0] == 0:
        raise ConfigError(
            f"weights are {config.weights}: the first must be above 0, or a merge erases what was trained"
        )
    if config.merges and "safety_adapter" in method.needs and config.safety_adapter is None:
        raise ConfigError(
            f"safety_adapter is missing: method {config.method!r} merges one in; give its folder or Hub id, or set "
            "gate='watch' to measure only"
        )


def _check_schedule(config: SafeMergeConfig) -> None:
    if config.every == 0 and not config.at_train_end:
        raise ConfigError("every is 0 and at_train_end is false, so no check would ever happen: set one of them")
    if config.every == 0 and config.asynchronous:
        raise ConfigError(
            "asynchronous is true but every is 0, and the check at the end is never beside a step: give every, or "
            "leave asynchronous out"
        )
    if config.until_step is not None and config.until_step < config.from_step:
        raise ConfigError(
            f"until_step {config.until_step} comes before from_step {config.from_step}: swap them, or leave one out"
        )
    if config.merges and config.method == "project" and config.every > 0:
        raise ConfigError(
            f"method 'project' with every={config.every} would project again and again, and C is not idempotent: "
            "set every=0, so that it happens once, at the end"
        )
