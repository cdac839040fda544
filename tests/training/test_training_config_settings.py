import json
import math

import pytest
import yaml
from transformers import HfArgumentParser

from safemerge_callback.errors import ConfigError
from safemerge_callback.methods.aliases import COMBINATION_TYPES
from safemerge_callback.training.config.settings import SafeMergeConfig, public_settings, resolve_config
from safemerge_callback.training.config.shorthands import OF_THE_RUN

GOOD = {"subspace": "s.safetensors", "safety_adapter": "folder"}


def test_method_and_weights_are_the_papers_by_default():
    config = SafeMergeConfig(**GOOD)
    assert (config.threshold, config.method, config.space) == (0.35, "linear", "delta")
    assert config.weights == [0.8, 0.2]
    assert config.at_train_end is True


def test_without_a_safety_adapter_the_method_is_pull():
    config = SafeMergeConfig(subspace="s")
    assert config == SafeMergeConfig(subspace="s", method="pull", strength=0.2)
    assert SafeMergeConfig(**GOOD).method == SafeMergeConfig(**GOOD, method="auto").method == "linear"
    # a run that is only watched may have the weights of adapters to come
    assert SafeMergeConfig(subspace="s", gate="watch", weights=[0.5, 0.3, 0.2]).method == "linear"
    with pytest.raises(ConfigError, match="safety_adapter is missing"):
        SafeMergeConfig.from_dict({"subspace": "s", "preset": "safemerge"})


def test_where_and_how_often_are_what_the_comparison_has_figures_of():
    config = SafeMergeConfig(**GOOD)
    assert (config.gate, config.every, config.cooldown) == ("all", 0.167, 0)


@pytest.mark.parametrize(
    ("knob", "value", "gate"),
    [("threshold", 0.5, "threshold"), ("z_threshold", -1.0, "calibrated"), ("reference_fraction", 0.4, "reference")],
)
def test_a_knob_that_the_default_gate_does_not_read_is_not_passed_over(knob, value, gate):
    assert SafeMergeConfig.from_dict({**GOOD, knob: value}).gate == gate
    assert SafeMergeConfig.from_dict({**GOOD, knob: SafeMergeConfig(**GOOD).to_dict()[knob]}).gate == gate
    assert SafeMergeConfig.from_dict({**GOOD, "gate": "watch", knob: value}).gate == "watch"
    # where every knob has a value, as on a command line, which of them were meant is not known
    with pytest.raises(ConfigError, match=f"{knob} is {value}, and gate 'all', the default, .* give gate='{gate}'"):
        SafeMergeConfig(**GOOD, **{knob: value})
    assert getattr(SafeMergeConfig(**GOOD, gate=gate, **{knob: value}), knob) == value


def test_without_a_gate_it_is_the_one_whose_knob_is_given():
    assert SafeMergeConfig.from_dict({**GOOD, "num_layers": 3}).gate == "num_layers"
    assert SafeMergeConfig.from_dict({**GOOD, "quantile": 0.5, "threshold": 0.4}).gate == "quantile"
    assert SafeMergeConfig.from_dict({**GOOD, "num_layers": None}).gate == "all"
    assert SafeMergeConfig.from_dict(SafeMergeConfig(**GOOD).to_dict()) == SafeMergeConfig(**GOOD)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gate": "treshold"}, "did you mean 'threshold'"),
        ({"method": "lineer"}, "did you mean 'linear'"),
        ({"space": "factors"}, "factor"),
        ({"threshold": 0}, "threshold is 0"),
        ({"threshold": 1.01}, "1.01"),
        ({"threshold": math.nan}, "nan"),
        ({"threshold": True}, "True"),
        ({"gate": "num_layers"}, "num_layers"),
        ({"gate": "num_layers", "num_layers": 0}, "num_layers=0"),
        ({"num_layers": 3}, "num_layers=3"),
        ({"gate": "quantile"}, "quantile=None"),
        ({"gate": "quantile", "quantile": 2}, "quantile=2"),
        ({"gate": "calibrated", "z_threshold": math.nan}, "z_threshold=nan"),
        ({"gate": "reference", "reference_fraction": -1}, "reference_fraction=-1"),
        ({"gate": "reference", "method": "project", "every": 0, "safety_adapter": None}, "gate 'reference' compares"),
        ({"gate": "random", "seed": -1}, "seed is -1"),
        ({"rearm": "0.1"}, "rearm='0.1'"),
        ({"gate": "all", "rearm": 0.1}, "rearm=0.1 with gate 'all'"),
        ({"min_task_weight": 1.5}, "min_task_weight is 1.5.*from 0 .no floor. to 1"),
        ({"min_task_weight": True}, "min_task_weight is True"),
        ({"soft": 1}, "soft is 1"),
        ({"soft": True, "gate": "gap"}, "soft=True with gate 'gap'"),
        ({"soft": True, "gate": "threshold", "space": "factor"}, "soft=True with method 'linear' in space 'factor'"),
        ({"spread_weights": "yes"}, "spread_weights is 'yes'"),
        ({"spread_weights": True, "method": "project", "every": 0}, "spread_weights is true, and method 'project'"),
        ({"weights": [0.8]}, r"\[0.8\]"),
        ({"weights": [0.8, math.inf]}, "inf"),
        ({"weights": [-0.8, 0.2]}, "-0.8"),
        ({"weights": [0.8, -0.8]}, "sum to 0"),
        ({"weights": [0.8, -0.2], "method": "ties", "density": 0.5}, "negative weight takes an update away.*'linear'"),
        ({"weights": [0.8, 0.2, 0.1]}, "with 1 safety adapters: give two"),
        ({"safety_adapter": ["a", "b"]}, r"missing with 2 safety adapters: give 3 numbers, \(w_live, w_safety_1, w_s"),
        ({"safety_adapter": ["a", "b"], "weights": [0.8, 0.2]}, "with 2 safety adapters: give 3 numbers"),
        ({"safety_adapter": ["a", "b"], "weights": [1, 1, 1], "method": "slerp"}, "from one update to one other"),
        ({"safety_adapter": ["a", "b"], "method": "pull"}, "'pull' goes toward one"),
        ({"safety_adapter": ["a", "a"], "weights": [1, 1, 1]}, "named twice"),
        ({"safety_adapter": []}, r"safety_adapter is \[\]"),
        ({"safety_adapter": ["a", ""]}, "non-empty string"),
        ({"module_weights": {"v_proj": [0.5]}}, "module_weights of 'v_proj'.*w_live"),
        ({"module_weights": {"v_proj": [0.5, 0.2, 0.2]}}, "with 1 safety adapters"),
        ({"module_weights": {"v_proj": [0, 1]}}, "first must be above 0"),
        ({"module_weights": {"v(": [0.5, 0.5]}}, "no regular expression"),
        ({"module_weights": "v_proj"}, "is no JSON"),
        ({"module_weights": [0.5]}, "map patterns"),
        ({"module_weights": {"v_proj": [0.5, 0.5]}, "method": "project"}, "which method 'project' does not read"),
        ({"module_weights": {"v_proj": [0.9, 0.5]}, "method": "pull"}, "'pull' goes a share of the way"),
        ({"strength": 0.5}, "strength is 0.5, which method 'linear' does not read"),
        ({"method": "pull", "strength": 0}, "strength is 0.*above 0 and at most 1"),
        ({"method": "pull", "strength": 1}, "a strength below 1"),
        ({"method": "orthogonal", "strength": 1.5}, "strength is 1.5.*above 0 and at most 1"),
        ({"method": "pull", "weights": [0.8, 0.1]}, "leave them out and give strength"),
        ({"method": "pull", "weights": [0.8, 0.2], "strength": 0.5}, "beside strength 0.5"),
        ({"method": "ema", "ema_decay": 1}, "ema_decay is 1"),
        ({"method": "ema", "ema_every": 0}, "ema_every is 0"),
        ({"ema_decay": 0.5}, "ema_decay is 0.5, which method 'linear' does not read"),
        ({"method": "ema", "spread_weights": True}, "what method 'ema' goes to moves"),
        ({"method": "orthogonal", "spread_weights": True}, "spread_weights is true, and method 'orthogonal'"),
        ({"space": "factor", "spread_weights": True}, "spread_weights is true, and method 'linear' in space 'factor'"),
        ({"operator": "orthogonal"}, "operator is 'orthogonal', which method 'linear' does not read"),
        ({"method": "project", "operator": "orthogonl"}, "did you mean 'orthogonal'"),
        (
            {"method": "project", "every": 0, "operator_rank": 4},
            "operator_rank is 4, which operator 'safelora' does not",
        ),
        ({"method": "project", "operator": "orthogonal", "operator_rank": 0}, "operator_rank is 0"),
        ({"method": "project", "every": 0, "weights": [0.8, 0.2]}, r"weights is \[0.8, 0.2\], which method 'project'"),
        ({"weights": [0.0, 0.2]}, "first must be above 0"),
        ({"weights": "0.8,0.2"}, "0.8,0.2"),
        ({"every": -1}, "every is -1"),
        ({"every": "50"}, "every is '50'"),
        ({"every": True}, "every is True"),
        ({"every": 1.5}, "every is 1.5: give a whole number, or a share"),
        ({"every": -0.5}, "every is -0.5"),
        ({"every": float("nan")}, "every is nan"),
        ({"every": float("inf")}, "every is inf"),
        ({"cooldown": -3}, "cooldown is -3"),
        ({"from_step": 10, "until_step": 9}, "until_step 9 comes before from_step 10"),
        ({"every": 0, "at_train_end": False}, "no check would ever happen"),
        ({"every": 0, "from_step": 5}, "from_step is 5 and until_step None, which bound periodic checks, but every is"),
        ({"every": 0, "until_step": 5}, "which bound periodic checks, but every is 0"),
        ({"min_task_weight": 0.9}, "min_task_weight is 0.9, and one merge leaves 0.8 of the task's update, so none"),
        ({"min_task_weight": 0.95, "module_weights": {"q_proj": [0.9, 0.1]}}, "one merge leaves 0.9 of the task's"),
        ({"method": "pull", "strength": 0.3, "min_task_weight": 0.8}, "one merge leaves 0.7"),
        ({"at_train_end": "no"}, "at_train_end is 'no': give true or false"),
        ({"asynchronous": "false"}, "asynchronous is 'false': give true or false"),
        ({"quiet": 1}, "quiet is 1: give true or false"),
        ({"at_train_end": "yes"}, "at_train_end is 'yes'"),
        ({"method": "cat"}, "changes the rank"),
        ({"method": "ties"}, "density is missing"),
        ({"method": "ties", "density": 0}, "density is 0"),
        ({"method": "dare_linear", "density": 1.2}, "density is 1.2"),
        ({"density": 0.5}, "density is 0.5, which method 'linear' does not read"),
        ({"majority_sign_method": "frequency"}, "'linear' elects no sign"),
        ({"method": "ties", "density": 0.5, "majority_sign_method": "totl"}, "did you mean 'total'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "7"}, "seed is '7'"),
        ({"method": "project"}, r"every=0\.167.*set every=0"),
        ({"method": "project", "every": 0, "space": "factor"}, "project"),
        ({"safety_adapter": None, "method": "linear"}, "safety_adapter is missing.*or set gate='watch'"),
        ({"safety_adapter": None, "weights": [0.8, 0.2]}, "'linear' merges one in; .* use method 'pull'"),
        ({"safety_adapter": ""}, "safety_adapter is ''"),
        ({"subspace": ""}, "subspace is ''"),
        ({"subspace": None}, "'subspace' is missing, and safety_adapter is 'folder', which is of a merge"),
    ],
)
def test_a_bad_value_is_refused_by_name_and_value(change, says):
    with pytest.raises(ConfigError, match=says):
        SafeMergeConfig(**{**GOOD, **change})


@pytest.mark.parametrize(
    "knobs",
    [
        {"subspace": "s"},
        {"subspace": "s", "gate": "watch"},
        {"subspace": "s", "gate": "watch", "method": "project", "every": 5},
        {"subspace": "s", "method": "project", "every": 0},
        {**GOOD, "gate": "num_layers", "num_layers": 10},
        {**GOOD, "gate": "threshold", "threshold": 1},
        {**GOOD, "gate": "calibrated", "z_threshold": -3, "soft": True, "rearm": 1},
        {**GOOD, "gate": "reference", "reference_fraction": 0.8, "method": "project", "every": 0},
        {**GOOD, "gate": "quantile", "quantile": 0.25, "rearm": 0, "min_task_weight": 0.5},
        {**GOOD, "gate": "gap", "spread_weights": True},
        {**GOOD, "gate": "random", "num_layers": 4, "seed": 7},
        {**GOOD, "every": 0},
        {**GOOD, "method": "dare_ties", "density": 0.5, "majority_sign_method": "frequency", "seed": 3},
        {**GOOD, "at_train_end": False},
        {**GOOD, "from_step": 10, "until_step": 10, "weights": (1, 0.5)},
    ],
)
def test_what_makes_sense_is_accepted_and_round_trips_through_json(knobs):
    config = SafeMergeConfig.from_dict(knobs)
    assert SafeMergeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_settings_are_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'treshold' is unknown; did you mean 'threshold'"):
        SafeMergeConfig.from_dict({**GOOD, "treshold": 0.5})
    with pytest.raises(ConfigError, match="'subspace' is missing"):
        SafeMergeConfig.from_dict({"safety_adapter": "x"})


def test_pefts_combination_types_are_aliases():
    """All that PEFT's own signature lists, each as a method and a space that there is."""
    import typing

    from peft import LoraModel

    theirs = typing.get_args(typing.get_type_hints(LoraModel.add_weighted_adapter)["combination_type"])
    if not theirs:
        pytest.skip("this version of PEFT does not list them in its signature")
    assert len(theirs) == 11
    assert set(theirs) | {"linear_svd"} == set(COMBINATION_TYPES)
    for alias in theirs:
        pruning = {"density": 0.5} if alias.split("_")[0] in ("ties", "dare", "magnitude") else {}
        method = "linear" if alias == "svd" else alias.removesuffix("_svd")
        space = "delta" if alias.endswith("svd") or alias == "cat" else "factor"
        assert COMBINATION_TYPES[alias] == (method, space)
        if alias != "cat":
            config = SafeMergeConfig.from_dict({**GOOD, **pruning, "combination_type": alias})
            assert (config.method, config.space) == (method, space)


def test_a_bad_combination_type_is_refused():
    with pytest.raises(ConfigError, match=r"'liner' is unknown.*did you mean 'linear'"):
        SafeMergeConfig.from_dict({**GOOD, "combination_type": "liner"})
    with pytest.raises(ConfigError, match="changes the rank"):
        SafeMergeConfig.from_dict({**GOOD, "combination_type": "cat"})
    with pytest.raises(ConfigError, match="alias of both"):
        SafeMergeConfig.from_dict({**GOOD, "combination_type": "svd", "method": "linear"})


def test_yaml(tmp_path):
    path = tmp_path / "guard.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "weights": [0.7, 0.3], "every": 25}))
    assert SafeMergeConfig.from_yaml(path) == SafeMergeConfig(**GOOD, weights=[0.7, 0.3], every=25)
    path.write_text("- a list")
    with pytest.raises(ConfigError, match="holds list"):
        SafeMergeConfig.from_yaml(path)
    path.write_text("a: [unclosed")
    with pytest.raises(ConfigError, match=r"guard.yaml' is no YAML: .*Give a YAML file of settings"):
        SafeMergeConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        SafeMergeConfig.from_yaml(tmp_path / "absent.yaml")


def test_config_or_keywords_but_not_both():
    config = SafeMergeConfig(**GOOD)
    assert resolve_config(config, {}) is config
    assert resolve_config(None, GOOD) == config
    with pytest.raises(ConfigError, match=r"\['threshold'\] were given beside a config"):
        resolve_config(config, {"threshold": 0.5})
    with pytest.raises(ConfigError, match="config is a str"):
        resolve_config("guard.yaml", {})


@pytest.mark.parametrize("parser", ["transformers", "trl"])
def test_the_command_line_takes_the_class_as_it_is(parser):
    if parser == "trl":
        from trl import TrlParser as Parser
    else:
        Parser = HfArgumentParser
    words = (
        "--subspace s --safety_adapter a --weights 0.7 0.3 --every 25 --until_step 75 --no_at_train_end --cooldown 5 "
        "--gate quantile --quantile 0.2 --rearm 0 --min_task_weight 0.5 --seed 3"
    )
    (config,) = Parser(SafeMergeConfig).parse_args_into_dataclasses(words.split())
    expected = SafeMergeConfig(
        subspace="s",
        safety_adapter="a",
        weights=[0.7, 0.3],
        every=25,
        until_step=75,
        at_train_end=False,
        cooldown=5,
        gate="quantile",
        quantile=0.2,
        rearm=0.0,
        min_task_weight=0.5,
        seed=3,
    )
    assert config == expected


def test_every_knob_has_one_sentence():
    for name, knob in SafeMergeConfig.__dataclass_fields__.items():
        help = knob.metadata["help"]
        assert help.endswith("."), name
        assert help.count(". ") == 0, name


def test_a_command_lines_whole_float_is_steps():
    assert repr(SafeMergeConfig(**GOOD, every=25.0).every) == "25"
    assert SafeMergeConfig(**GOOD, every=0.25).every == 0.25
    with pytest.raises(ConfigError, match=r"'project' with every=0\.25 would project again"):
        SafeMergeConfig("s", method="project", every=0.25)


@pytest.mark.parametrize(
    "changed",
    [
        {"min_task_weight": 0.8},
        {"min_task_weight": 0.9, "module_weights": {"q_proj": [0.95, 0.05]}},
        {"min_task_weight": 0.9, "spread_weights": True},
        {"min_task_weight": 0.9, "soft": True, "gate": "threshold"},
        {"min_task_weight": 1.0, "weights": [1.0, 0.2]},
        {"min_task_weight": 0.9, "gate": "watch"},
        {"every": 0, "from_step": 0},
    ],
)
def test_a_floor_and_bounds_that_can_act_are_taken(changed):
    SafeMergeConfig(**GOOD, **changed)


def test_what_is_published_names_no_merge_that_there_is_not_and_no_path(tmp_path):
    prompts = tmp_path / "asked.txt"
    prompts.write_text("x")
    listed = [{"replay": {"prompts": [f"harm:{prompts}", f"benign:{prompts}"]}}]
    config = SafeMergeConfig(corrections=listed)
    assert config.to_publish().keys() == {*OF_THE_RUN, "subspace"}
    assert config.to_publish()["corrections"][0]["replay"]["prompts"] == ["harm:asked.txt", "benign:asked.txt"]
    assert config.words == "replay (prompts ['harm:asked.txt', 'benign:asked.txt'])"
    # what an older release published of such a run
    older = {**SafeMergeConfig(subspace="s").to_dict(), "subspace": None}
    assert public_settings(older).keys() == {*OF_THE_RUN, "subspace"} - {"corrections"}
    assert SafeMergeConfig(subspace="s").to_publish().keys() == SafeMergeConfig(subspace="s").to_dict().keys()
    assert SafeMergeConfig.from_dict({}).words == "replay"
