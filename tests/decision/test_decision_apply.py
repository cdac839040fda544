import math
import warnings
from dataclasses import replace

import pytest
import torch

from safemerge_callback.decision import MergePlan, apply, check_safety_adapter, measure, merged_factors
from safemerge_callback.errors import AdapterError, PlanError
from safemerge_callback.live import live_factors, writer_for
from safemerge_callback.subspace.placement import Device

ALL = {"gate": "all"}


def decided(case, **knobs):
    return MergePlan.decide(measure(writer_for(case.model).gather(), case.subspace), **knobs)


def best(target, rank):
    """The best rank-`rank` approximation there is, by a dense float64 SVD."""
    u, s, v = torch.linalg.svd(target, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def apart(x, y):
    return float((x - y).norm() / y.norm())


CASES = [
    ("llama", {}, {}),
    ("qwen2", {}, {"rank": 2, "alpha": 3}),
    ("llama", {}, {"rank": 7, "alpha": 16, "use_rslora": True}),
    ("qwen2", {"use_rslora": True}, {"alpha": 5}),
    ("gemma", {"targets": ["q_proj", "v_proj", "embed_tokens"]}, {"rank": 3}),
    ("gpt2", {"targets": ["c_attn", "c_fc"], "fan_in_fan_out": True}, {"fan_in_fan_out": True}),
    ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}}, {"rank_pattern": {"q_proj": 1}}),
]


@pytest.mark.parametrize(("family", "lora", "other"), CASES)
def test_linear_is_the_best_low_rank_sum_of_the_updates(make_case, safety_for, family, lora, other):
    case = make_case(family, **lora)
    safety, theirs = safety_for(case, **other)
    ours, ranks = case.updates(), {n: f.rank for n, f in live_factors(case.model).items()}
    edits = apply(decided(case, **ALL), writer_for(case.model), safety)
    now = case.updates()
    assert [e.name for e in edits] == list(ours)
    for edit in edits:
        target = 0.8 * ours[edit.name] + 0.2 * theirs[edit.name]
        expected = best(target, ranks[edit.name])
        assert apart(now[edit.name], expected) < 1e-5
        assert edit.residual == pytest.approx(apart(expected, target), abs=1e-5)
        assert edit.change == pytest.approx(apart(now[edit.name], ours[edit.name]), rel=1e-4)


def test_at_full_rank_nothing_is_lost(make_case, safety_for):
    case = make_case("llama", targets=["q_proj", "v_proj"], rank=32)
    safety, theirs = safety_for(case)
    ours = case.updates()
    edits = apply(decided(case, **ALL, weights=(0.7, 0.4)), writer_for(case.model), safety)
    for edit in edits:
        assert apart(case.updates()[edit.name], 0.7 * ours[edit.name] + 0.4 * theirs[edit.name]) < 1e-5
        assert edit.residual < 1e-5


@pytest.mark.parametrize("alpha", [8, 3])
def test_factor_space_equals_peft(make_case, safety_for, tmp_path, alpha):
    case = make_case("qwen2")
    safety, _ = safety_for(case, alpha=alpha)
    case.model.load_adapter(tmp_path / "safety", "safety")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.model.add_weighted_adapter(["default", "safety"], [0.8, 0.2], "merged", combination_type="linear")
    theirs = case.updates("merged")
    case.model.delete_adapter("safety")
    case.model.delete_adapter("merged")
    apply(decided(case, **ALL, space="factor"), writer_for(case.model), safety)
    now = case.updates()
    assert len(now) == 12
    for name in now:
        assert apart(now[name], theirs[name]) < 1e-5


@pytest.mark.parametrize("space", ["delta", "factor", "aligned_factor"])
def test_weights_one_and_zero_change_no_bit(make_case, safety_for, space):
    case = make_case("llama")
    safety, _ = safety_for(case)
    before = case.snapshot()
    edits = apply(decided(case, **ALL, space=space, weights=(1, 0)), writer_for(case.model), safety)
    assert len(edits) == 12
    assert {(e.residual, e.change) for e in edits} == {(0.0, 0.0)}
    assert case.changed(before) == set()


def test_only_the_selected_modules_change(make_case, safety_for):
    case = make_case("qwen2")
    safety, _ = safety_for(case)
    plan = decided(case, gate="num_layers", num_layers=5)
    before = case.snapshot()
    edits = apply(plan, writer_for(case.model), safety)
    assert case.changed(before) == set(plan.selected) == {e.name for e in edits}
    assert len(edits) == 5


def test_a_bfloat16_adapter_is_computed_wide_and_cast_once(make_case, safety_for):
    case = make_case("llama")
    safety, _ = safety_for(case, rank=2, alpha=3)
    case.model.to(torch.bfloat16)
    narrow = replace(
        safety,
        factors={n: replace(f, A=f.A.bfloat16(), B=f.B.bfloat16()) for n, f in safety.factors.items()},
    )
    wide = {n: replace(f, A=f.A.float(), B=f.B.float()) for n, f in narrow.factors.items()}
    plan = decided(case, **ALL)
    exact, _ = merged_factors(plan, writer_for(case.model).gather(), replace(safety, factors=wide))
    apply(plan, writer_for(case.model), narrow)
    for name, live in live_factors(case.model).items():
        assert live.A.dtype == torch.bfloat16
        assert torch.equal(live.A, exact[name].A.bfloat16())
        assert torch.equal(live.B, exact[name].B.bfloat16())


def test_project_is_safe_loras_and_needs_no_safety_adapter(make_case):
    for family, lora in [("llama", {}), ("gpt2", {"targets": ["c_attn", "c_fc"], "fan_in_fan_out": True})]:
        case = make_case(family, **lora)
        ours, before = case.updates(), case.snapshot()
        plan = decided(case, gate="num_layers", num_layers=3, method="project")
        apply(plan, writer_for(case.model), subspace=case.subspace)
        assert case.changed(before) == set(plan.selected)
        maps = {n: f.shape for n, f in live_factors(case.model).items()}
        for name in plan.selected:
            V = case.V[name]
            assert tuple(V.shape) == maps[name]
            expected = V @ V.T / V.norm() @ ours[name]
            assert apart(case.updates()[name], expected) < 1e-5


def test_project_asks_for_no_stack_that_measure_did_not_keep(make_case):
    case = make_case("llama")
    case.subspace.place(Device())
    plan = decided(case, gate="num_layers", num_layers=3, method="project")
    case.subspace.path.unlink()
    assert len(apply(plan, writer_for(case.model), subspace=case.subspace)) == 3


def test_a_broken_update_is_reported_and_left_while_others_merge(make_case, safety_for):
    case = make_case("llama")
    safety, _ = safety_for(case)
    broken = "layers.0.self_attn.k_proj"
    with torch.no_grad():
        live_factors(case.model)[broken].A[0, 0] = math.nan
    before = case.snapshot()
    plan = decided(case, **ALL)
    assert "not finite" in plan.verdicts[broken].reason
    apply(plan, writer_for(case.model), safety)
    assert case.changed(before) - {broken} == set(plan.selected)
    assert len(plan.selected) == 11
    assert broken not in plan.selected
    for name, parameter in case.snapshot().items():
        if broken in name:
            assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0))


@pytest.mark.parametrize("space", ["delta", "factor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_module_that_fails_writes_nothing_at_all(make_case, safety_for, bad, space):
    case = make_case("llama")
    safety, _ = safety_for(case)
    broken = "layers.1.mlp.down_proj"
    safety.factors[broken].B[0, 0] = bad
    before = case.snapshot()
    with pytest.raises(PlanError, match=r"1 modules.*'layers\.1\.mlp\.down_proj'; nothing was written"):
        apply(decided(case, **ALL, space=space), writer_for(case.model), safety)
    assert case.changed(before) == set()
    with pytest.raises(AdapterError, match=r"'layers\.1\.mlp\.down_proj' holds NaN"):
        check_safety_adapter(safety, live_factors(case.model))


def test_a_value_too_large_for_the_live_dtype_writes_nothing_at_all(make_case, safety_for):
    case = make_case("llama")
    safety, _ = safety_for(case)
    case.model.to(torch.float16)
    safety.factors["layers.1.mlp.down_proj"].B.mul_(1e9)
    before = case.snapshot()
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj.*Nothing was written"):
        apply(decided(case, **ALL), writer_for(case.model), safety)
    assert case.changed(before) == set()


def test_a_safety_adapter_that_does_not_fit_writes_nothing_at_all(make_case, safety_for):
    case = make_case("llama")
    before, live = case.snapshot(), live_factors(case.model)
    lacking, _ = safety_for(case, targets=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    whole, _ = safety_for(case, rank=2)
    module = whole.factors["layers.0.self_attn.q_proj"]
    wider = {**whole.factors, module.name: replace(module, A=torch.ones(2, 40))}
    refusals = [
        (lacking, {}, r"lacks 2 of 12 modules, the first is 'layers\.0\.mlp\.down_proj'"),
        (replace(whole, factors=wider), {}, r"q_proj' maps \(32, 40\) \(d_out, d_in\), the live one \(32, 32\)"),
        (whole, {"space": "factor"}, "has rank 2, the live one 4.*space 'delta'"),
    ]
    for safety, knobs, message in refusals:
        with pytest.raises(AdapterError, match=message):
            apply(decided(case, **ALL, **knobs), writer_for(case.model), safety)
        with pytest.raises(AdapterError, match=message):
            check_safety_adapter(safety, live, **knobs)
    assert case.changed(before) == set()
    check_safety_adapter(whole, live)


def test_modules_that_are_not_selected_need_not_be_in_the_safety_adapter(make_case, safety_for):
    case = make_case("llama")
    plan = decided(case, gate="num_layers", num_layers=2)
    whole, _ = safety_for(case)
    few = replace(whole, factors={n: f for n, f in whole.factors.items() if n in plan.selected})
    assert len(apply(plan, writer_for(case.model), few)) == 2


def test_what_a_method_needs_is_asked_for(make_case, safety_for):
    case = make_case("llama")
    safety, _ = safety_for(case)
    before, writer = case.snapshot(), writer_for(case.model)
    with pytest.raises(PlanError, match="'linear' needs a safety adapter"):
        apply(decided(case, **ALL), writer)
    with pytest.raises(PlanError, match="'project' projects on the safety subspace"):
        apply(decided(case, **ALL, method="project"), writer, safety)
    with pytest.raises(PlanError, match="'cat' changes the rank"):
        apply(decided(case, **ALL, method="cat"), writer, safety)
    assert case.changed(before) == set()


def test_cat_is_exact_where_nothing_live_must_keep_its_rank(make_case, safety_for):
    case = make_case("llama")
    safety, theirs = safety_for(case, rank=2, alpha=3)
    factors, ours = writer_for(case.model).gather(), case.updates()
    new, edits = merged_factors(decided(case, **ALL, method="cat"), factors, safety)
    for edit in edits:
        A, B = (t.double() for t in new[edit.name])
        target = 0.8 * ours[edit.name] + 0.2 * theirs[edit.name]
        assert A.shape[0] == 6
        assert apart(factors[edit.name].scaling * B @ A, target) < 1e-6
        assert edit.change == pytest.approx(apart(target, ours[edit.name]), rel=1e-4)


def test_a_plan_made_for_another_adapter_is_refused(make_case, safety_for):
    case = make_case("llama")
    safety, _ = safety_for(case)
    plan, factors = decided(case, **ALL), writer_for(case.model).gather()
    first = next(iter(factors))
    with pytest.raises(PlanError, match=f"the plan merges '{first}', which the adapter lacks"):
        merged_factors(plan, {n: f for n, f in factors.items() if n != first}, safety)
    thin = replace(factors[first], A=factors[first].A[:2], B=factors[first].B[:, :2])
    with pytest.raises(PlanError, match=r"of rank 4 and is now .* of rank 2: measure it again"):
        merged_factors(plan, {**factors, first: thin}, safety)


def test_a_plan_that_selects_nothing_touches_nothing(make_case):
    case = make_case("llama")
    before = {n: p._version for n, p in case.model.named_parameters()}
    assert apply(decided(case, gate="watch"), writer_for(case.model)) == ()
    assert {n: p._version for n, p in case.model.named_parameters()} == before


def test_a_module_that_has_not_moved_takes_the_safety_update(make_case, safety_for):
    case = make_case("llama")
    safety, theirs = safety_for(case)
    still = "layers.0.self_attn.q_proj"
    with torch.no_grad():
        live_factors(case.model)[still].B.zero_()
    edits = {e.name: e for e in apply(decided(case, **ALL), writer_for(case.model), safety)}
    assert apart(case.updates()[still], 0.2 * theirs[still]) < 1e-5
    assert math.isinf(edits[still].change)


def test_merging_waits_for_the_device_once_and_keeps_the_parameters(make_case, safety_for, host_waits):
    case = make_case("qwen2", rank_pattern={"v_proj": 2})
    safety, _ = safety_for(case)
    plan, factors = decided(case, **ALL), writer_for(case.model).gather()
    with host_waits:
        merged_factors(plan, factors, safety)
    assert host_waits.seen == ["tolist"]
    parameters = {n: id(p) for n, p in case.model.named_parameters()}
    apply(plan, writer_for(case.model), safety)
    assert {n: id(p) for n, p in case.model.named_parameters()} == parameters
    assert all(p.requires_grad for n, p in case.model.named_parameters() if "lora_" in n)


def test_the_same_plan_gives_the_same_bits(make_case, safety_for):
    case = make_case("llama")
    safety, _ = safety_for(case)
    plan, factors = decided(case, **ALL), writer_for(case.model).gather()
    (one, edits), (two, again) = (merged_factors(plan, factors, safety) for _ in range(2))
    assert edits == again
    assert all(torch.equal(one[n].A, two[n].A) and torch.equal(one[n].B, two[n].B) for n in one)
