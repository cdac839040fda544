"""A gate, a merge method and a weights rule with knobs of their own, registered here and known nowhere else."""

import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from safemerge_callback import MergePlan, SafeMergeConfig, Subspace, apply_safemerge, merge_adapters, sweep_adapters
from safemerge_callback.cli import app
from safemerge_callback.cli.options import gates_named
from safemerge_callback.decision import GATES, KNOB, Gate, Reading, Readings, Verdict, as_gate, measure, undecided
from safemerge_callback.decision.gates import gate, gate_knobs
from safemerge_callback.decision.weights import WEIGHTS, weights_knobs, weights_rule
from safemerge_callback.errors import ConfigError
from safemerge_callback.io.knobs import Knob
from safemerge_callback.live import live_factors
from safemerge_callback.methods import METHODS
from safemerge_callback.methods.how import how_knobs
from safemerge_callback.methods.linear import linear
from safemerge_callback.methods.registry import register
from safemerge_callback.offline.merge_yaml import read_recipe
from safemerge_callback.ops import LowRank
from tests.support.trainer import entries


def _share(value, beside):
    if not isinstance(value, float) or not 0 < value <= 1:
        raise ConfigError(f"boost is {value!r}: give a share, above 0 and at most 1")
    return value


def _parity(value, beside):
    if value not in (0, 1):
        raise ConfigError(f"parity is {value!r}: give 0 or 1")
    return value


def _number(value, beside):
    if value is not None and not value > 0:
        raise ConfigError(f"halving is {value!r}: give a number above 0")
    return value


def test_a_knob_that_stands_twice_is_refused_and_text_is_read():
    given = {"subspace": "s", "gate": "alternate", "parity": 1}
    assert SafeMergeConfig.from_dict({**given, "knobs": "{}"}).knobs == {"parity": 1}
    with pytest.raises(ConfigError, match="parity is given twice, by itself and in knobs"):
        SafeMergeConfig.from_dict({**given, "knobs": '{"parity": 0}'})
    with pytest.raises(ConfigError, match="knobs is 5: map names of knobs"):
        SafeMergeConfig.from_dict({**given, "knobs": 5})


@pytest.fixture(autouse=True)
def _dummies():
    """Three entries in the registries, which are as they were afterwards."""
    registries = [(registry, dict(registry)) for registry in (GATES, KNOB, METHODS, WEIGHTS)]

    @gate(knob=Knob("parity", "Which of two modules in turn.", _parity, default=0))
    def alternate(readings, *, parity):
        return {name: Verdict(i % 2 == parity, f"number {i}") for i, name in enumerate(readings)}

    @register(spaces=("delta",), needs=frozenset({"safety_adapter"}), knobs=(Knob("boost", "Share.", _share, 0.5),))
    def boosted(live, safety, *, weights, boost=1.0):
        return linear(live, [LowRank(u.A, boost * u.B) for u in safety], weights=weights)

    @weights_rule(knob=Knob("halving", "What the weight of safety is divided by in the first layer.", _number))
    def halved(weights, halving, case):
        return {n: (w[0], *(x / halving for x in w[1:])) if "layers.0." in n else w for n, w in weights.items()}

    yield
    for registry, before in registries:
        registry.clear()
        registry.update(before)


CHOSEN = {"gate": "alternate", "parity": 1, "method": "boosted", "boost": 0.25, "halving": 2.0}


def test_a_plan_is_decided_by_them(world):
    factors = live_factors(world.model())
    readings = measure(factors, Subspace.load(world.subspace))
    plan = MergePlan.decide(readings, **CHOSEN)
    assert plan.selected == tuple(n for n in readings if "v_proj" in n)
    assert plan.taken == {"boost": 0.25}
    assert plan.noted == {"halving": 2.0}
    assert {n: w for n, w in plan.weights.items() if "layers.0" in n} == {
        n: (0.8, 0.1) for n in readings if "layers.0" in n
    }
    assert plan.words == "method boosted, space delta, weights 0.8 / 0.2, halving 2.0, boost 0.25"
    assert MergePlan.decide(readings, parity=0).gate == Gate("alternate", knobs={"parity": 0})
    for knobs, says in [
        ({"parity": 2}, "parity is 2: give 0 or 1"),
        ({"gate": "all", "parity": 1}, "parity=1 is read by gate 'alternate' only, and gate is 'all'"),
        ({"method": "boosted", "boost": 2.0}, "boost is 2.0: give a share"),
        ({"method": "linear", "boost": 0.25}, "boost is 0.25, which method 'linear' does not read.*'boosted'"),
        ({"halving": -1}, "halving is -1"),
        ({"halvign": 2}, "did you mean 'halving'"),
    ]:
        with pytest.raises(ConfigError, match=says):
            MergePlan.decide(readings, **knobs)


def run_verb(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def saved(world, tmp_path):
    model = world.model(seed=7)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "task")
    return tmp_path / "task"


def test_folders_and_models_are_merged_by_them(world, tmp_path):
    task = saved(world, tmp_path)
    plan = merge_adapters(task, world.safety, world.subspace, tmp_path / "out", **CHOSEN)
    # a quarter of the safety update everywhere, and half of that in layer 0
    same = {"method": "linear", "weights": (0.8, 0.05), "module_weights": {"layers.0.*v_proj": (0.8, 0.025)}}
    told = (tmp_path / "out" / "safemerge.yaml").read_text()
    assert "parity: 1\n" in told
    assert "boost: 0.25\n" in told
    assert "halving: 2.0\n" in told
    assert {*read_recipe(tmp_path / "out" / "safemerge.yaml")} >= {"parity", "boost", "halving"}
    (merge,) = entries(tmp_path / "out", "merge")
    assert (merge["boost"], merge["halving"]) == (0.25, 2.0)
    assert {m["name"]: m["weights"] for m in merge["modules"]} == {n: list(plan.weights[n]) for n in plan.selected}
    (check,) = entries(tmp_path / "out", "check")
    assert (check["gate"], check["parity"]) == ("alternate", 1)
    model = PeftModel.from_pretrained(world.model(seed=7).unload(), task)
    applied = apply_safemerge(model, world.safety, world.subspace, **CHOSEN)
    assert applied.weights == plan.weights
    merged = live_factors(model, "safemerge")
    other = PeftModel.from_pretrained(world.model(seed=7).unload(), task)
    gates = Gate("alternate", knobs={"parity": 1})
    apply_safemerge(other, world.safety, world.subspace, gate=gates, **same)
    for name, module in live_factors(other, "safemerge").items():
        assert torch.allclose(merged[name].B @ merged[name].A, module.B @ module.A, atol=1e-6)
        changed = not torch.equal(merged[name].B, live_factors(model, "default")[name].B)
        assert changed == ("v_proj" in name)
    cells = sweep_adapters(task, world.safety, world.subspace, gates=["all", gates], methods=["boosted"], boost=0.25)
    assert [cell.method for cell in cells] == ["boosted", "boosted"]


def test_a_sweep_refuses_a_knob_that_nothing_declares(world, tmp_path):
    """One of a method that is not swept is left out, as it always was."""
    task = saved(world, tmp_path)
    for knobs in ({"bosot": 0.25}, {"threshold": 0.3}, {"halving": 2.0}):
        with pytest.raises(ConfigError, match=f"knob '{next(iter(knobs))}' of a sweep is unknown"):
            sweep_adapters(task, world.safety, world.subspace, **knobs)
    assert sweep_adapters(task, world.safety, world.subspace, methods=["linear"], boost=0.25)


def test_a_gate_that_says_nothing_of_intervals_is_asked_with_exact_readings():
    between = Reading("a", 0.3, 0.75, 1.0, 4, (8, 8), interval=(0.2, 0.4))
    exact = Reading("b", 0.3, 0.75, 1.0, 4, (8, 8))
    assert undecided(Readings([between, exact]), "alternate", parity=0) == ["a"]
    assert undecided(Readings([between, exact]), "all") == []


def test_a_limit_by_a_knob_of_the_gates_own_may_be_rearmed():
    @gate(knob=Knob("edge", "Where.", lambda value, beside: value, default=0.5), limit=lambda _, edge: edge)
    def edged(readings, *, edge):
        return {name: Verdict(reading.cosine < edge, "edge") for name, reading in readings.items()}

    reading = Reading("a", 0.3, 0.75, 1.0, 4, (8, 8))
    assert Gate("edged", rearm=0.1).limit(reading) == 0.5
    assert str(as_gate("edged", {"edge": 0.2})) == "edged 0.2"


def test_the_command_line_reads_a_knob_of_the_gates_own():
    assert gates_named(None, "alternate=1,all") == [Gate("alternate", knobs={"parity": 1}), Gate("all")]


def test_the_command_line_takes_them(world, tmp_path):
    task, knobs = saved(world, tmp_path), ["--knob", "parity=1", "--knob", "boost=0.25", "--knob", "halving=2.0"]
    merge = ["merge", task, world.safety, "-s", world.subspace, "--gate", "alternate", "--method", "boosted", *knobs]
    run_verb(*merge, "-o", tmp_path / "out")
    merge_adapters(task, world.safety, world.subspace, tmp_path / "python", **CHOSEN)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "python"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    sweep = ["sweep", task, world.safety, "-s", world.subspace, "--methods", "boosted"]
    assert run_verb(*sweep, *knobs[2:4]) != run_verb(*sweep)
    for words, says in [
        (["--knob", "boost"], "knob 'boost' has no value"),
        (["--knob", "bost=1"], "knob 'bost' of a merge is unknown; did you mean 'boost'"),
        (["--knob", "output=x"], "knob 'output' of a merge is unknown: choose among"),
        (["--knob", "boost=1", "--knob", "boost=2"], "boost' is given twice"),
        (["--density", "0.5", "--knob", "density=0.4"], "density' is given twice"),
        (["--knob", "boost=[1"], "knob 'boost', '[1', is no YAML"),
    ]:
        assert says in run_verb(*merge[:5], *words, "-o", tmp_path / "no", code=2)


def test_help_has_every_knob_that_the_package_declares_or_says_how_it_is_given():
    options = set(re.findall(r"--([a-z-]+)", run_verb("merge", "--help")))
    declared = {*gate_knobs(), *how_knobs(), *weights_knobs()} - {"step", "rearm", "parity", "boost", "halving"}
    by_knob = {"module_weights", "focal", "learned", "mu", "ridge", "off_diagonal", "prune_share"}
    by_knob |= {"slope_share", "per_task_slope", "gradient_share"}
    assert {name for name in declared if name.replace("_", "-") not in options} == by_knob
    assert "such as module_weights" in " ".join(run_verb("merge", "--help").split())


def test_a_weights_rule_alone_does_not_tell_of_an_adapter_to_come(world):
    readings = measure(live_factors(world.model()), Subspace.load(world.subspace))
    assert MergePlan.decide(readings, strength=0.5, halving=2.0).method == "pull"


def test_a_run_is_merged_by_them(world, tmp_path):
    world.trainer(tmp_path, world.guard(**CHOSEN)).train()
    merges = entries(tmp_path, "merge")
    assert len(merges) == 3
    for merge in merges:
        assert (merge["method"], merge["boost"], merge["halving"]) == ("boosted", 0.25, 2.0)
        assert all("v_proj" in module["name"] for module in merge["modules"])
        weights = {m["name"].split("layers.")[1][0]: m["weights"] for m in merge["modules"]}
        assert weights == {"0": [0.8, 0.1], "1": [0.8, 0.2]}
    assert {m["merge"] for m in entries(tmp_path, "check")[0]["modules"]} == {True, False}


def test_settings_hold_them(world, tmp_path):
    config = SafeMergeConfig.from_dict(world.knobs(**CHOSEN))
    assert config.knobs == {"parity": 1, "boost": 0.25, "halving": 2.0}
    assert config == SafeMergeConfig.from_dict(config.to_dict())
    assert SafeMergeConfig(**world.knobs(method="boosted", knobs='{"boost": 0.25}')).how == config.how
    with pytest.raises(ConfigError, match="knob 'boots' of knobs is unknown; did you mean 'boost'"):
        SafeMergeConfig(**world.knobs(knobs={"boots": 1}))
    with pytest.raises(ConfigError, match=r"boost is 0\.25, which method 'linear' does not read"):
        SafeMergeConfig.from_dict(world.knobs(method="linear", boost=0.25))
