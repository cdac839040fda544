"""What each setting may be, apart for its length: one refusal, which prints what it was and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...corrections.check_rows import RowSettings
from ...corrections.registry import chosen_corrections, place_of, plain
from ...corrections.replay import REPLAY
from ...corrections.schedule import check_bounds, check_steps
from ...decision import GATES, Choices, Gate, gate_of, needs_of
from ...decision.choices import check_counts
from ...decision.vetoes import under
from ...decision.weights.spread import check_spread
from ...errors import ConfigError, shown
from ...io.choices import truth
from ...io.documents import parse_json
from ...io.knobs import named_values, unknown_knob
from ...io.numbers import is_number, is_whole
from ...live.optimizer import check_optimizer
from ...methods import METHODS, How, Method, get_method, method_of
from ...methods.how import AUTO
from ...signals.module_signals import data_among
from ...subspace.placement import check_placement
from .choices import declared_knobs, gate_at, how_of, rules_of
from .shorthands import OF_THE_RUN, as_list

# How what a correction needs is given.
_ADVICE = {
    "subspace": "give the safety-subspace file (`safemerge build` makes one)",
    "safety_adapter": "give its folder or Hub id",
}


class Draft(SimpleNamespace):
    """The settings while they are checked, by name."""

    @property
    def adapters(self) -> list[str]:
        """The safety adapters, none, one or several."""
        return adapters_of(self.safety_adapter)

    @property
    def merges(self) -> bool:
        """Whether any check may change the model."""
        return self.subspace is not None and GATES[self.gate].merges

    @property
    def how(self) -> How:
        """The method with its knobs."""
        return how_of(vars(self))


def adapters_of(safety_adapter: Any) -> list[str]:
    """Return the safety adapters that a setting names, none, one or several."""
    return [safety_adapter] if isinstance(safety_adapter, str) else list(safety_adapter or [])


def checked_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, numbers in their own type and what is left out worked out; nothing else is changed.

    ConfigError for a setting that cannot be, or contradicts another, or that nothing reads. `defaults`: what each is
    where it is left out.
    """
    config = Draft(**settings)
    _check_types(config)
    if config.subspace is None:
        _check_no_merge(config, defaults)
    else:
        _check_knobs(config)
        _check_gate(config)
        _check_method(config)
        _check_strength(config)
        _check_schedule(config)
    _check_data(config)
    _check_corrections(config)
    return vars(config)


def _check_types(config: Draft) -> None:
    """Refuse what YAML or a command line may hold by mistake, such as '50' or true where a count is meant."""
    if config.subspace is not None and (not isinstance(config.subspace, str | Path) or not str(config.subspace)):
        raise ConfigError(f"subspace is {shown(config.subspace)}: give the path or the Hub id of a safety subspace")
    for name in ("subspace", "safety_adapter", "journal"):
        value = getattr(config, name)
        setattr(config, name, str(value) if isinstance(value, Path) else value)
    _check_adapters(config)
    for name in ("journal", "adapter_name", "wandb_chart"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{name} is {shown(value)}: give a non-empty string, or leave it out")
    for name in ("from_step", "until_step", "cooldown", "num_layers", "seed"):
        value = getattr(config, name)
        optional = value is None and name in ("until_step", "num_layers")
        if not optional and not is_whole(value, 0):
            raise ConfigError(f"{name} is {shown(value)}: give a whole number of 0 or more")
    for name in ("at_train_end", "asynchronous", "soft", "spread_weights", "quiet"):
        truth(getattr(config, name), name)
    check_placement(config.placement)


def _check_no_merge(config: Draft, defaults: Mapping[str, Any]) -> None:
    """Refuse settings of a merge where there is no subspace to measure with."""
    of_a_merge = [name for name in vars(config) if name not in ("subspace", *OF_THE_RUN)]
    # A gate may be there because its knob is.
    of_a_merge.sort(key=lambda name: name == "gate")
    if idle := [name for name in of_a_merge if getattr(config, name) != defaults[name]]:
        place = next((words for name in idle if (words := place_of(name))), "")
        raise ConfigError(
            f"setting 'subspace' is missing, and {idle[0]} is {shown(getattr(config, idle[0]))}, which is of a merge: "
            "give the safety-subspace file (`safemerge build` makes one), or leave "
            f"{', '.join(idle)} out{f'; {place}' if place else ''}"
        )


def join_knobs(value: Any, singles: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting `knobs` with those that stand by themselves; ConfigError for one that stands twice."""
    knobs = _knobs(value)
    if twice := sorted(knobs.keys() & singles.keys()):
        raise ConfigError(f"{twice[0]} is given twice, by itself and in knobs: give it once")
    return {**knobs, **singles}


def _knobs(value: Any) -> Mapping[str, Any]:
    text = _read_json(value, "knobs", '{"name": 0.5}')
    return {} if text is None else named_values(text)


def _check_knobs(config: Draft) -> None:
    """Refuse knobs that nobody has declared, and those that are settings by themselves."""
    knobs = _knobs(config.knobs)
    known = declared_knobs(vars(config))
    if unknown := [name for name in knobs if name not in known]:
        raise unknown_knob(unknown[0], known, "knobs")
    config.knobs = dict(knobs) or None


def _check_adapters(config: Draft) -> None:
    adapters: Any = config.safety_adapter
    names: list[Any] = list(adapters) if isinstance(adapters, list | tuple) else [adapters]
    names = [str(name) if isinstance(name, Path) else name for name in names]
    if adapters is not None and (not names or not all(isinstance(name, str) and name for name in names)):
        raise ConfigError(
            f"safety_adapter is {shown(adapters)}: give a folder or Hub id, a non-empty string, or a list of them, or "
            "leave it out"
        )
    if len(set(names)) < len(names):
        raise ConfigError(
            f"safety_adapter is {shown(adapters)}: one is named twice, name it once and add its weights up"
        )
    config.safety_adapter = names[0] if len(names) == 1 else names


def _check_gate(config: Draft) -> None:
    gate_at(vars(config))
    if config.threshold == 0:
        raise ConfigError(
            "threshold is 0, below which no cosine is: give one above 0, or set gate='watch' to measure only"
        )
    for name in ("threshold", "z_threshold", "reference_fraction"):
        setattr(config, name, float(getattr(config, name)))
        value = getattr(config, name)
        if GATES[config.gate].whole and value != getattr(Gate, name):
            raise ConfigError(
                f"{name} is {shown(value)}, and gate {config.gate!r}, the default, merges every module whatever it is: "
                f"give gate={gate_of({name: value}, config.gate)!r}, or leave {name} out"
            )
    if "safety_cosines" in GATES[config.gate].needs and config.safety_adapter is None:
        raise ConfigError(
            f"safety_adapter is missing: gate {config.gate!r} compares with its own cosines; give its folder or Hub "
            "id, or choose another gate"
        )


def _check_method(config: Draft) -> None:
    config.method = _method_of(config)
    method = get_method(config.method)
    if not method.keeps_rank:
        able = sorted(name for name, other in METHODS.items() if other.keeps_rank)
        raise ConfigError(
            f"method {config.method!r} changes the rank, which a live adapter cannot: choose one of {able}, "
            "or merge after training with `safemerge merge`"
        )
    check_optimizer(None, config.optimizer_state)
    how = _how(config, method)
    for name, value in how.knobs.items():
        if name in vars(config):
            setattr(config, name, value)
    _check_weights(config, how)
    _check_average(config)
    if config.merges and "safety_adapter" in method.needs and config.safety_adapter is None:
        raise ConfigError(
            f"safety_adapter is missing: method {config.method!r} merges one in; give its folder or Hub id, use method "
            "'pull', which needs none, or set gate='watch' to measure only"
        )


def _method_of(config: Draft) -> str:
    """What `auto` stands for: linear, and pull where no safety adapter is named, nor weights for one to come."""
    if not config.merges and config.method == AUTO:
        return "linear"
    return method_of(str(config.method), len(config.adapters), config.weights)


def _how(config: Draft, method: Method) -> How:
    many, weighs = len(config.adapters), _weighs(method)
    if not weighs:
        _check_idle(config, "weights", "module_weights", "strength")
    elif "safety_adapter" in method.optional and many > 1:
        raise ConfigError(
            f"safety_adapter is {config.safety_adapter!r}, and method {config.method!r} goes toward one: name one, or "
            "use method 'linear'"
        )
    return how_of(vars(config), many if weighs else None)


def _weighs(method: Method) -> bool:
    return method.weighted or method.strength is not None


def _check_weights(config: Draft, how: How) -> None:
    """Bring the weights into numbers, as many as there are updates; none for a method that reads none."""
    config.module_weights = _read_json(config.module_weights, "module_weights", '{"v_proj": [0.5, 0.5]}')
    choices = Choices(gate_at(vars(config)), how, rules_of(vars(config)))
    if not _weighs(how.kind):
        return
    # Watching a run needs no adapter; as many weights as were given are those of adapters to come.
    if config.adapters and how.kind.weighted:
        check_counts(choices, len(config.adapters))
    patterns = choices.rules.get("module_weights", {})
    config.weights, config.strength = list(how.weights), how.strength
    config.module_weights = {pattern: list(weights) for pattern, weights in patterns.items()} or None
    for weights in (config.weights, *patterns.values()):
        if weights[0] == 0 and how.kind.takes_away:
            raise ConfigError(
                f"weights are {list(weights)}: the first must be above 0 (a strength below 1), or a merge erases what "
                "was trained"
            )


def _check_average(config: Draft) -> None:
    if "average" not in config.how.needs:
        return _check_idle(config, "ema_decay", "ema_every")
    config.ema_decay = 0.9 if config.ema_decay is None else config.ema_decay
    config.ema_every = 10 if config.ema_every is None else config.ema_every
    decay, every = config.ema_decay, config.ema_every
    if not is_number(decay) or not 0 <= decay < 1:
        raise ConfigError(f"ema_decay is {shown(decay)}: give the share that the average keeps, from 0 to below 1")
    if not is_whole(every, 1):
        raise ConfigError(f"ema_every is {shown(every)}: give a whole number of optimizer steps, 1 or more")


def _check_idle(config: Draft, *names: str) -> None:
    """Refuse a knob that the method does not read."""
    for name in names:
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}, which method {config.method!r} does not read: leave it out"
            )


def _read_json(value: Any, name: str, example: str) -> Any:
    """A mapping that came as text, from a command line."""
    if not isinstance(value, str):
        return value
    return parse_json(value, f"{name} {shown(value)}", advice=f"Give such as {example}")


def _check_data(config: Draft) -> None:
    """Bring the setting `data` into what tells all of its settings; refuse it where nothing reads it."""
    rows = _read_json(config.data, "data", '{"num_task_rows": 32}')
    if rows is None or config.subspace is None:
        return
    config.data = asdict(RowSettings.of(rows))
    if not data_among(needs_of(config.how, gate_at(vars(config)), rules_of(vars(config)))):
        raise ConfigError(
            f"data is {shown(rows)}, and neither gate {config.gate!r} nor method {config.method!r} nor a weights rule "
            "asks the live model about rows: leave it out"
        )


def _check_strength(config: Draft) -> None:
    floor = config.min_task_weight
    if not is_number(floor) or not 0 <= floor <= 1:
        raise ConfigError(
            f"min_task_weight is {shown(floor)}: give a share of the task's update, from 0 (no floor) to 1"
        )
    config.min_task_weight = float(floor)
    _check_floor(config)
    if config.spread_weights:
        check_spread(config.how)


def _check_floor(config: Draft) -> None:
    """Refuse a floor that holds back the very first merge of every module."""
    if not (config.merges and config.weights) or config.soft or config.spread_weights:
        return
    first = max(weights[0] for weights in (config.weights, *(config.module_weights or {}).values()))
    if config.how.kind.takes_away and under(first, config.min_task_weight):
        raise ConfigError(
            f"min_task_weight is {config.min_task_weight:g}, and one merge leaves {first:g} of the task's update, so "
            "none would ever happen: lower it, or raise the first weight (lower the strength)"
        )


def _check_schedule(config: Draft) -> None:
    config.every = check_steps("every", config.every)
    if config.every == 0 and not config.at_train_end:
        raise ConfigError("every is 0 and at_train_end is false, so no check would ever happen: set one of them")
    if config.every == 0 and config.asynchronous:
        raise ConfigError(
            "asynchronous is true but every is 0, and the check at the end is never beside a step: give every, or "
            "leave asynchronous out"
        )
    if config.every == 0 and (config.from_step or config.until_step is not None):
        raise ConfigError(
            f"from_step is {config.from_step} and until_step {config.until_step}, which bound periodic checks, but "
            "every is 0, so there are none: give every, or leave them out"
        )
    check_bounds(config.from_step, config.until_step)
    if config.merges and "one_merge" in config.how.needs and config.every > 0:
        raise ConfigError(
            f"method {config.method!r} with every={config.every} would project again and again, and C is not idempotent"
            ": set every=0, so that it happens once, at the end, or operator='orthogonal'"
        )


def _check_corrections(config: Draft) -> None:
    """Bring the list of corrections into what tells every setting of theirs; None where it names none.

    Without a subspace and without a list it is replay, which needs no file.
    """
    listed = as_list(config.corrections)
    if listed is None and config.subspace is None:
        listed = [{REPLAY: {}}]
    chosen = [] if listed is None else chosen_corrections(listed)
    if not chosen and config.subspace is None:
        raise ConfigError("corrections is empty and there is no subspace, so nothing would be done: give one of them")
    config.corrections = plain(chosen) or None
    for one in chosen:
        for need in sorted(one.kind.needs & vars(config).keys()):
            if getattr(config, need) is None:
                raise ConfigError(
                    f"{need} is missing: correction {one.kind.name!r} needs one; {_ADVICE[need]}, or leave the "
                    "correction out"
                )
