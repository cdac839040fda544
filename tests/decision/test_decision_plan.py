import itertools
import math
from dataclasses import FrozenInstanceError, replace

import pytest

from safemerge_callback.decision import MergePlan, Reading, Readings, Verdict, measure
from safemerge_callback.decision.gates import as_gate
from safemerge_callback.errors import ConfigError, PlanError
from safemerge_callback.live import live_factors
from safemerge_callback.methods import check_merge, method_of
from safemerge_callback.training import SafeMergeConfig


def some_readings():
    return Readings(
        [
            Reading("layers.0.self_attn.q_proj", 0.21, 0.71, 1.5, 4, (8, 8)),
            Reading("layers.0.self_attn.v_proj", 0.62, 0.94, 1.5, 4, (8, 8)),
            Reading("layers.1.self_attn.q_proj", math.nan, 0.71, math.nan, 4, (8, 8)),
            Reading("layers.1.self_attn.[v]", 1.0, 0.94, 0.0, 4, (8, 8)),
        ]
    )


def released_decision(V, update, tau):
    """SafeMERGE as published: the dense operator, the cosine of the flattened matrices, merged below the threshold."""
    C = V @ V.T / V.norm()
    projected = C @ update
    return float((projected * update).sum() / (projected.norm() * update.norm())) < tau


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_decisions_equal_the_published_rule(make_case, family):
    case = make_case(family)
    factors = live_factors(case.model)
    readings = measure(factors, case.subspace)
    dense = {n: f.scaling * f.B.detach().double() @ f.A.detach().double() for n, f in factors.items()}
    ordered = sorted(r.cosine for r in readings.values())
    between = [(a + b) / 2 for a, b in itertools.pairwise(ordered)]
    counts = set()
    for tau in [0.0, 0.35, 0.5, *between, 1.0]:
        selected = MergePlan.decide(readings, threshold=tau).selected
        assert set(selected) == {n for n in dense if released_decision(case.V[n], dense[n], tau)}
        counts.add(len(selected))
    assert counts == set(range(len(readings) + 1))


def test_the_defaults_are_the_callbacks():
    plan, config = MergePlan.decide(some_readings()), SafeMergeConfig(subspace="s", safety_adapter="a")
    assert (plan.gate.name, plan.method, plan.space, list(plan.how.weights)) == ("all", "linear", "delta", [0.8, 0.2])
    assert (config.gate, config.method, config.space, config.weights) == ("all", "linear", "delta", [0.8, 0.2])
    pulled, config = MergePlan.decide(some_readings(), strength=0.3), SafeMergeConfig(subspace="s", strength=0.3)
    assert (pulled.gate.name, pulled.method, list(pulled.how.weights)) == (config.gate, config.method, config.weights)
    assert pulled.method == "pull"
    # all but the one that is not finite
    assert plan.selected == ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.self_attn.[v]")


@pytest.mark.parametrize(
    ("knobs", "gate"),
    [
        ({"threshold": 0.35}, "threshold"),
        ({"quantile": 0.5}, "quantile"),
        ({"num_layers": 1, "threshold": 0.4}, "num_layers"),
        ({"soft": True}, "threshold"),
        ({"rearm": 0.05}, "threshold"),
        ({"seed": 3}, "all"),
    ],
)
def test_a_knob_still_names_its_gate(knobs, gate):
    method = {"method": "linear"} if "soft" in knobs else {}
    assert MergePlan.decide(some_readings(), **knobs, **method).gate.name == as_gate(None, knobs).name == gate


@pytest.mark.parametrize(
    "told", [{"weights": (0.7, 0.3)}, {"module_weights": {"q_proj": (0.5, 0.5)}}, {"space": "factor"}]
)
def test_whatever_tells_of_an_adapter_makes_auto_linear(told):
    assert MergePlan.decide(some_readings(), **told).method == method_of("auto", 0, **told) == "linear"
    assert method_of("auto", 0) == "pull"
    assert method_of("auto", 2) == method_of("auto", None) == "linear"


def test_a_plan_prints_every_module_with_its_decision_and_reason():
    plan = MergePlan.decide(some_readings(), threshold=0.35)
    lines = str(plan).splitlines()
    assert "1 of 4 modules to merge" in lines[0]
    assert "gate threshold 0.35, method linear, space delta, weights 0.8 / 0.2" in lines[0]
    for name, verdict in plan.verdicts.items():
        row = next(line for line in lines if name in line)
        assert verdict.reason in row
        assert ("merge" if verdict.merge else "keep") in row
    assert "0.2100" in str(plan)
    assert "0.7100" in str(plan)


def test_a_long_name_is_not_cut():
    name = "layers.0." + "x" * 300
    assert name in str(MergePlan.decide(Readings([Reading(name, 0.2, 0.7, 1.0, 4, (8, 8))])))


def test_a_plan_cannot_be_changed():
    plan = MergePlan.decide(some_readings())
    with pytest.raises(FrozenInstanceError):
        plan.weights = (1.0, 0.0)
    with pytest.raises(TypeError):
        plan.verdicts["layers.0.self_attn.v_proj"] = Verdict(True, "because")


@pytest.mark.parametrize("knobs", [{"gate": "num_layers", "num_layers": 2}, {"gate": "all"}, {"gate": "watch"}])
def test_other_gates(knobs):
    selected = MergePlan.decide(some_readings(), **knobs).selected
    names = list(some_readings())
    assert (
        selected
        == {"num_layers": (names[0], names[1]), "all": (names[0], names[1], names[3]), "watch": ()}[knobs["gate"]]
    )


def test_nothing_is_projected_where_there_is_nothing_to_project_on():
    readings = Readings([Reading("a", 1.0, 1.0, 2.0, 4, (8, 8), comparable=False)])
    assert MergePlan.decide(readings, gate="all").selected == ("a",)
    plan = MergePlan.decide(readings, gate="all", method="project")
    assert plan.selected == ()
    assert "nothing to project on" in plan.verdicts["a"].reason


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"method": "linaer"}, "did you mean 'linear'"),
        ({"space": "dleta"}, r"space 'dleta'.*'linear'.*\['aligned_factor', 'delta', 'factor'\].*did you mean 'delta'"),
        ({"method": "cat", "space": "factor"}, "space 'factor' is not one that method 'cat' works in"),
        ({"gate": "num_layers", "num_layers": 5}, "num_layers=5 is more than the 4"),
        ({"gate": "quantiles"}, "gate 'quantiles' is unknown"),
        *[
            ({"weights": weights}, r"weights=.*(from 0 to 2 and others from -2, not all 0|with method)")
            for weights in [
                (0, 0),
                (-0.1, 1),
                (0.8, 2.1),
                (math.nan, 0.2),
                (math.inf, 0.2),
                (0.8,),
                "82",
                ("0.8", "0.2"),
                (True, False),
                0.8,
            ]
        ],
    ],
)
def test_knobs_without_meaning_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        MergePlan.decide(some_readings(), **knobs)


def test_weights_may_come_as_a_list_and_need_not_sum_to_one():
    assert MergePlan.decide(some_readings(), weights=[1, 0.5]).how.weights == (1.0, 0.5)
    assert check_merge("linear", "factor", [0, 2]) == (0.0, 2.0)


def test_verdicts_must_belong_to_the_readings_and_spare_the_broken():
    plan = MergePlan.decide(some_readings())
    with pytest.raises(PlanError, match=r"1 modules.*'layers\.0\.self_attn\.q_proj'"):
        replace(plan, verdicts={n: v for n, v in plan.verdicts.items() if n != "layers.0.self_attn.q_proj"})
    with pytest.raises(PlanError, match=r"'layers\.1\.self_attn\.q_proj'.*not finite"):
        replace(plan, verdicts={n: Verdict(True, "all") for n in plan.verdicts})
