"""Several adapters, negative weights, weights by module: on live models, against dense float64 sums."""

from dataclasses import replace

import pytest
import torch

from safemerge_callback.decision import MergePlan, apply, measure, merged_factors
from safemerge_callback.decision.weights.by_pattern import check_module_weights, pattern_of
from safemerge_callback.errors import AdapterError, ConfigError, PlanError
from safemerge_callback.live import writer_for
from safemerge_callback.methods import merge_weights
from safemerge_callback.record import merge_entry

# As many rows as q_proj has, so that nothing is truncated.
WHOLE = {"targets": ["q_proj", "v_proj"], "rank": 32, "alpha": 32}


def another(safety, seed=9, rank=3, scaling=0.7):
    """An adapter of other rank and scaling on the same modules, and its dense updates."""
    rng, factors = torch.Generator().manual_seed(seed), {}
    for name, f in safety.factors.items():
        A, B = torch.randn(rank, f.d_in, generator=rng), torch.randn(f.d_out, rank, generator=rng)
        factors[name] = replace(f, A=0.1 * A, B=0.1 * B, scaling=scaling)
    dense = {n: f.scaling * f.B.double() @ f.A.double() for n, f in factors.items()}
    return replace(safety, source="another", factors=factors), dense


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.4), (1.0, 0.5, -0.5), (0.9, -0.3, 0.2)])
def test_several_adapters_and_negative_weights_are_the_dense_sum(make_case, safety_for, weights):
    case = make_case("llama", **WHOLE)
    safety, one = safety_for(case, rank=2)
    second, other = another(safety)
    before, writer = case.updates(), writer_for(case.model)
    plan = MergePlan.decide(measure(writer.gather(), case.subspace), gate="all", weights=weights)
    edits = apply(plan, writer, [safety, second])
    for edit in edits:
        n = edit.name
        want = weights[0] * before[n] + weights[1] * one[n] + weights[2] * other[n]
        torch.testing.assert_close(case.updates()[n], want, rtol=1e-5, atol=1e-6)
        assert plan.task_weight_of(n) == weights[0]
    assert "weights " + " / ".join(f"{w:g}" for w in weights) in str(plan).splitlines()[0]
    assert merge_entry(3, plan, edits, dict.fromkeys(before, 1.0), 0.1)["weights"] == list(weights)


def test_weights_differ_by_module_and_the_first_pattern_counts(make_case, safety_for):
    case = make_case("llama", **WHOLE)
    safety, dense = safety_for(case)
    before, writer = case.updates(), writer_for(case.model)
    asked = {"layers.0.*v_proj": [0.5, 0.5], "v_proj": [0.6, 0.3], "nothing|layers.1.self_attn.q_proj": (1, -0.2)}
    readings = measure(writer.gather(), case.subspace)
    plan = MergePlan.decide(readings, gate="all", module_weights=asked)
    edits = apply(plan, writer, safety)
    want = {
        "layers.0.self_attn.v_proj": (0.5, 0.5),
        "layers.1.self_attn.v_proj": (0.6, 0.3),
        "layers.1.self_attn.q_proj": (1.0, -0.2),
        "layers.0.self_attn.q_proj": (0.8, 0.2),
    }
    assert {n: plan.weights[n] for n in before} == {n: want[n.removeprefix("model.")] for n in before}
    for name, update in before.items():
        live, guard = plan.weights[name]
        torch.testing.assert_close(case.updates()[name], live * update + guard * dense[name], rtol=1e-5, atol=1e-6)
        assert plan.task_weight_of(name) == live
    entry = merge_entry(3, plan, edits, dict.fromkeys(before, 1.0), 0.1)
    assert {m["name"]: tuple(m["weights"]) for m in entry["modules"]} == {n: plan.weights[n] for n in before}
    assert entry["module_weights"]["v_proj"] == [0.6, 0.3]
    assert "v_proj 0.6 / 0.3" in str(plan).splitlines()[0]


def test_weights_by_module_fade_in_too(make_case, safety_for):
    case = make_case("llama", **WHOLE)
    readings = measure(writer_for(case.model).gather(), case.subspace)
    tau = max(r.cosine for r in readings.values())
    plan = MergePlan.decide(readings, threshold=tau, soft=True, module_weights={"v_proj": [0.5, 0.5]})
    for name in plan.selected:
        share = 1 - readings[name].cosine / tau
        asked = (0.5, 0.5) if "v_proj" in name else (0.8, 0.2)
        assert plan.weights[name] == pytest.approx((1 + share * (asked[0] - 1), share * asked[1]))
    safety, dense = safety_for(case)
    before, writer = case.updates(), writer_for(case.model)
    apply(plan, writer, safety)
    for name in plan.selected:
        live, guard = plan.weights[name]
        torch.testing.assert_close(
            case.updates()[name], live * before[name] + guard * dense[name], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("method", ["ties", "dare_linear", "slerp", "orthogonal"])
def test_weights_by_module_are_those_of_a_plan_for_these_modules_alone(make_case, safety_for, method):
    """Every method takes them: each module is merged as where its weights are everyone's."""
    case = make_case("llama", targets=["q_proj", "v_proj"])
    safety, _ = safety_for(case)
    factors = writer_for(case.model).gather()
    readings = measure(factors, case.subspace)
    how = {"gate": "all", "method": method, **({"density": 0.5} if method in ("ties", "dare_linear") else {})}
    mixed = MergePlan.decide(readings, module_weights={"v_proj": [0.5, 0.4]}, **how)
    found, _ = merged_factors(mixed, factors, safety)
    for weights, part in (((0.8, 0.2), "q_proj"), ((0.5, 0.4), "v_proj")):
        plain, _ = merged_factors(MergePlan.decide(readings, weights=weights, **how), factors, safety)
        for name in (n for n in found if part in n):
            assert torch.equal(found[name].A, plain[name].A)
            assert torch.equal(found[name].B, plain[name].B)


def test_what_does_not_fit_is_refused(make_case, safety_for):
    case = make_case("llama", targets=["q_proj", "v_proj"])
    safety, _ = safety_for(case)
    factors = writer_for(case.model).gather()
    readings = measure(factors, case.subspace)
    plan = MergePlan.decide(readings, gate="all", weights=(0.8, 0.1, 0.1))
    with pytest.raises(PlanError, match=r"3 weights \(0.8, 0.1, 0.1\) and 1 safety adapters.*give 2 weights"):
        merged_factors(plan, factors, safety)
    lacking = replace(safety, source="lacking", factors=dict(list(safety.factors.items())[1:]))
    with pytest.raises(AdapterError, match="'lacking' lacks 1 of 4 modules"):
        merged_factors(plan, factors, [safety, lacking])
    with pytest.raises(ConfigError, match=r"'k_proj' fits none of the 4 modules"):
        MergePlan.decide(readings, module_weights={"k_proj": [0.5, 0.5]})
    with pytest.raises(ConfigError, match=r"'layers.*v_proj' fits none.*earlier pattern takes"):
        MergePlan.decide(readings, module_weights={"v_proj": [0.5, 0.5], "layers.*v_proj": [0.6, 0.4]})
    with pytest.raises(ConfigError, match=r"module_weights of 'v_proj': weights=\[0.5, 0.2, 0.2\] with 1 safety"):
        MergePlan.decide(readings, module_weights={"v_proj": [0.5, 0.2, 0.2]})
    with pytest.raises(PlanError, match="'ema' goes to the average of a run's own updates"):
        merged_factors(MergePlan.decide(readings, gate="all", method="ema"), factors, safety=None)


def test_a_pull_takes_a_share_of_the_way_a_module(make_case):
    case = make_case("llama", targets=["q_proj", "v_proj"])
    factors = writer_for(case.model).gather()
    readings = measure(factors, case.subspace)
    shares = {"q_proj": [1.0, 0.0], "v_proj": [0.3, 0.7]}
    new, _ = merged_factors(MergePlan.decide(readings, method="pull", module_weights=shares), factors)
    for name, merged in new.items():
        share = 0.3 if "v_proj" in name else 1.0
        assert torch.equal(merged.A, factors[name].A)
        torch.testing.assert_close(merged.B, share * factors[name].B.double(), check_dtype=False)
    for broken in ([0.5, 0.2], [-0.5, 1.5], [0.5, 0.3, 0.2]):
        with pytest.raises(ConfigError, match=r"a share of the way|one update to one other|w_live from 0|negative"):
            MergePlan.decide(readings, method="pull", module_weights={"v_proj": broken})


def test_a_pattern_is_of_whole_parts_as_pefts():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj"]
    assert [pattern_of(n, ["proj", "q_proj"]) for n in names] == ["q_proj", None]
    assert [pattern_of(n, [r"layers\.\d+\..*"]) for n in names] == [r"layers\.\d+\..*"] * 2
    assert [pattern_of(n, ["0.mlp.up_proj|x"]) for n in names] == [None, None]
    from peft.utils.other import get_pattern_key

    for name in names:
        for pattern in ("q_proj", "proj", r"layers\.0\..*", "10.mlp.up_proj"):
            assert (pattern_of(name, [pattern]) == pattern) == (get_pattern_key([pattern], name) == pattern)


def test_weights_left_out():
    assert merge_weights("linear", None, None) == (0.8, 0.2)
    assert merge_weights("pull", None, None) == (0.8, 0.2)
    assert merge_weights("pull", None, 0.25) == (0.75, 0.25)
    assert merge_weights("ema", None, None) == (0.0, 1.0)
    assert check_module_weights("linear", "delta", None) == {}
    with pytest.raises(ConfigError, match="sum to 0"):
        check_module_weights("linear", "delta", {"v_proj": (0.5, -0.5)})


def test_a_safety_adapter_may_be_needed_or_not(make_case, safety_for):
    """`pull` with one is `linear`; without one the update shrinks toward the aligned model, in training's units."""
    case = make_case("llama", targets=["q_proj", "v_proj"])
    safety, _ = safety_for(case)
    factors = writer_for(case.model).gather()
    readings = measure(factors, case.subspace)
    pull = MergePlan.decide(readings, gate="all", method="pull", strength=0.25)
    found, _ = merged_factors(pull, factors, safety)
    plain, _ = merged_factors(MergePlan.decide(readings, gate="all", weights=(0.75, 0.25)), factors, safety)
    assert all(torch.equal(found[n].B, plain[n].B) for n in found)
    alone, edits = merged_factors(pull, factors)
    for name, (A, B) in alone.items():
        assert torch.equal(A, factors[name].A)
        torch.testing.assert_close(B, 0.75 * factors[name].B)
    assert [e.change for e in edits] == pytest.approx([0.25] * 4)
    assert pull.task_weight_of(next(iter(found))) == 0.75
