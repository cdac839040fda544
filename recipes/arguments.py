"""What recipes that train are told on a command line and in a YAML file, whichever trainer they use.

Apart from `finetune`, since preferences and rewards have the same settings of rows, probe and callback.
"""

from __future__ import annotations

import sys
import tempfile
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.data.mixing import compliance_rows
from recipes.data.system import check_system
from recipes.settings import read_settings
from safemerge_callback.corrections.harmful_rows import HarmfulRowSettings
from safemerge_callback.corrections.registry import CORRECTIONS, named_entries
from safemerge_callback.errors import ConfigError, nearest, shown
from safemerge_callback.signals.chat import template_settings
from safemerge_callback.training import SafeMergeConfig
from safemerge_callback.training.config.shorthands import as_list

PREFIX = "safemerge_"


@dataclass
class ExampleArguments:
    """Which examples to train on, and what is asked of the model meanwhile."""

    data: str = field(
        default="",
        metadata={
            "help": "Name of the data: safety, sentiment, arithmetic, cities, gsm8k, pubmedqa, ncbi_disease[:FOLDER], "
            "or a file (.jsonl, .csv, .json) or a data set of the Hub, in the columns of docs/own_data.md."
        },
    )
    data_split: str = field(default="train", metadata={"help": "Split of the data."})
    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "In the place of data, a mixture as TRL has it: path, split, columns, fraction of each."},
    )
    num_examples: int | None = field(default=None, metadata={"help": "Take only this many examples, the first ones."})
    train_system: str | None = field(
        default=None, metadata={"help": "System prompt of every training row, in the place of any that it has."}
    )
    eval_system: str | None = field(default=None, metadata={"help": "System prompt of what the probe asks (PTST)."})
    probe_every: int = field(
        default=0, metadata={"help": "Steps from one safety probe to the next, which changes nothing; 0: no probe."}
    )
    probe_prompts: int = field(
        default=16, metadata={"help": "Harmful and harmless prompts, and task rows twice, of the validation split."}
    )
    harmful_rows: int = field(
        default=0,
        metadata={
            "help": "Harmful prompts with templated compliance, which says nothing, for corrections that need harmful "
            "answers and name no rows."
        },
    )
    mixing_seed: int = field(
        default=0, metadata={"help": "Which examples give way, and the order of what is mixed in."}
    )
    buffer_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter that is at work, frozen, while this one trains, and dropped (Buffer and Reinforce)."
        },
    )

    def __post_init__(self) -> None:
        if bool(self.data) == bool(self.datasets):
            raise ConfigError(
                f"data is {shown(self.data)} and datasets is {shown(self.datasets)}: give one of them, a name, file or "
                "data set of the Hub, or TRL's list of such with path"
            )
        if self.datasets and self.data_split != "train":
            raise ConfigError(f"data_split is {shown(self.data_split)} beside datasets: write split in each of them")
        if self.harmful_rows < 0:
            raise ConfigError(f"harmful_rows is {self.harmful_rows}: give 0 or more")
        if self.probe_every < 0 or self.probe_prompts < 1:
            raise ConfigError(
                f"probe_every is {self.probe_every}, probe_prompts {self.probe_prompts}: give 0 or more, and 1 or more"
            )
        for name in ("train_system", "eval_system"):
            check_system(name, getattr(self, name))
        if self.eval_system is not None and not self.probe_every:
            raise ConfigError(
                f"eval_system is {shown(self.eval_system)} and there is no probe that would ask with it: set "
                "probe_every, or leave it out; recipes/evaluate.py has an eval_system of its own"
            )


@dataclass
class TemplatedArguments(ExampleArguments):
    """The same, for trainers whose own settings say nothing of the chat template, as GRPO's do."""

    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What the chat template is given in training and probe, such as {enable_thinking: false}."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chat_template_kwargs = self.template

    @property
    def template(self) -> dict[str, Any] | None:
        """What the chat template is given, as keywords; None for nothing."""
        return template_settings(self.chat_template_kwargs) or None


def _prefixed() -> type:
    """Return SafeMergeConfig's knobs as command-line arguments: one owner, and no clash with the trainer's names."""
    hints = typing.get_type_hints(SafeMergeConfig)
    knobs: list[tuple[str, Any, Any]] = []
    for knob in fields(SafeMergeConfig):
        needed = knob.default is MISSING and knob.default_factory is MISSING
        kind = hints[knob.name] | None if needed else hints[knob.name]
        default = {"default": None} if needed else {"default": knob.default, "default_factory": knob.default_factory}
        knobs.append((PREFIX + knob.name, kind, field(metadata=dict(knob.metadata), **default)))
    return make_dataclass("SafeMergeArguments", knobs, namespace={"__module__": __name__})


SafeMergeArguments = _prefixed()


def safemerge_config(arguments: Any, data: ExampleArguments | None = None) -> SafeMergeConfig | None:
    """Return the callback's settings out of SafeMergeArguments; None where neither subspace nor corrections are named.

    `data`: whose harmful rows corrections have that need some and name none. Raises ConfigError for a value that
    SafeMergeConfig refuses, and for other knobs without either.
    """
    knobs = {knob.name: getattr(arguments, PREFIX + knob.name) for knob in fields(SafeMergeConfig)}
    if data is not None and data.harmful_rows and knobs["corrections"]:
        rows = compliance_rows(data.harmful_rows, data.mixing_seed)
        knobs["corrections"] = with_harmful_rows(knobs["corrections"], rows)
    if knobs["subspace"] is not None or knobs["corrections"] is not None:
        return SafeMergeConfig(**knobs)
    idle = SafeMergeArguments()
    useless = [PREFIX + name for name in knobs if getattr(arguments, PREFIX + name) != getattr(idle, PREFIX + name)]
    if useless:
        raise ConfigError(
            f"{useless} have no effect without {PREFIX}subspace: name that file, or {PREFIX}corrections, or drop them"
        )
    return None


def with_harmful_rows(corrections: Any, rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a list of corrections in which those that need harmful answers, and name none, have these."""
    entries = []
    for name, settings in named_entries(as_list(corrections)):
        kind = CORRECTIONS.get(name)
        needs = kind is not None and issubclass(kind.settings, HarmfulRowSettings)
        entries.append({name: {"rows": list(rows), **settings} if needs else dict(settings)})
    return entries


def parse(classes: Sequence[type], args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `--config FILE` and overrides into instances of `classes`; ConfigError for a key that none of them has."""
    from trl import TrlParser

    with _config_file(sys.argv[1:] if args is None else list(args)) as words:
        *parsed, unknown = TrlParser(classes).parse_args_and_config(words, return_remaining_strings=True)
    keys = [text.removeprefix("--") for text in unknown if text.startswith("--")]
    if unknown:
        allowed = [knob.name for one in classes for knob in fields(one)]
        key = keys[0] if keys else unknown[0]
        raise ConfigError(f"setting {key!r} is unknown{nearest(key, allowed)}; see --help for all of them")
    return tuple(parsed)


@contextmanager
def _config_file(args: list[str]) -> Iterator[list[str]]:
    """The arguments, with a file that holds all settings in the place of one that may have a base.

    TrlParser's own reading knows of none, and keeps the last of two equal keys.
    """
    if "--config" not in args[:-1]:
        yield args
        return
    place = args.index("--config") + 1
    settings = read_settings(args[place], "config file")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / Path(args[place]).name
        whole.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        yield [*args[:place], str(whole), *args[place + 1 :]]
