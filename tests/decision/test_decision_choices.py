"""Knobs by name: each goes to the one that has declared it, and every verb takes those that it took."""

import inspect
from typing import get_args, get_type_hints

import pytest

from safemerge_callback import MergePlan, apply_safemerge, measure, merge_adapters, sweep_adapters
from safemerge_callback.decision import Choices, Gate, choose
from safemerge_callback.decision.choices import PlanKnobs, check_counts
from safemerge_callback.decision.gates import gate_knobs
from safemerge_callback.decision.weights import weights_knobs
from safemerge_callback.errors import ConfigError
from safemerge_callback.methods import How
from safemerge_callback.methods.how import how_knobs

GATE = {"threshold", "num_layers", "z_threshold", "reference_fraction", "quantile", "seed", "step", "rearm", "soft"}
GATE |= {"slope_share", "per_task_slope", "gradient_share"}
HOW = {"method", "space", "weights", "module_weights", "strength", "operator", "operator_rank", "density"}
HOW |= {"majority_sign_method", "focal", "learned", "mu", "ridge", "off_diagonal", "prune_share"}
PARTS = {"finetuned", "safety", "subspace", "output", "bake", "overwrite", "device"}
PARTS |= {"task_rows", "safety_rows", "base"}


def keywords(function):
    """The keywords of a function, those of a TypedDict that it takes among them."""
    found = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            found.add(name)
            continue
        (knobs,) = get_args(get_type_hints(function)[name])
        found |= knobs.__optional_keys__ | knobs.__required_keys__
    return found


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        (MergePlan.decide, {"readings", "gate"} | GATE | HOW),
        (merge_adapters, PARTS | {"gate"} | GATE | HOW),
        (
            apply_safemerge,
            {"model", "safety_adapter", "subspace", "adapter_name", "new_adapter_name", "device", "gate"} | GATE | HOW,
        ),
        (measure, {"factors", "subspace", "device", "gate", "reference", "batch_bytes"} | GATE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_verb_takes_every_knob_by_name(verb, names):
    assert keywords(verb) == names


def test_a_sweep_takes_those_it_took():
    own = {"finetuned", "safety", "subspace", "gates", "weights", "methods", "space", "device"}
    assert keywords(sweep_adapters) >= own | {"density", "majority_sign_method"}


def test_type_checkers_know_every_knob_here():
    known = PlanKnobs.__optional_keys__
    assert {*gate_knobs(), *how_knobs(), *weights_knobs()} == known


def test_each_knob_goes_where_it_is_declared():
    chosen = choose(None, "ties", {"threshold": 0.3, "density": 0.5, "module_weights": {"v_proj": [0.5, 0.5]}})
    how = How("ties", knobs={"density": 0.5})
    assert chosen == Choices(Gate("threshold", threshold=0.3), how, {"module_weights": {"v_proj": (0.5, 0.5)}})
    assert choose(Gate("all"), how, {}) == Choices(Gate("all"), how)
    with pytest.raises(ConfigError, match="knob 'densty' of a merge is unknown; did you mean 'density'"):
        choose(None, "ties", {"densty": 0.5})
    with pytest.raises(ConfigError, match="soft=True with method 'ties'"):
        choose("threshold", "ties", {"density": 0.5, "soft": True})


def test_as_many_weights_as_adapters():
    check_counts(choose(None, "linear", {}), 1)
    with pytest.raises(ConfigError, match="with 2 safety adapters: give 3 numbers"):
        check_counts(choose(None, "linear", {}), 2)
    with pytest.raises(ConfigError, match="module_weights of 'v_proj'"):
        choose(None, "linear", {"module_weights": {"v_proj": [0.5, 0.2, 0.3]}})
