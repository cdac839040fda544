"""Decisions on compressed subspaces: always those of the exact measure, and exact reads only where they are needed."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_callback.decision import Gate, MergePlan, Reading, Readings, above, measure, undecided
from safemerge_callback.errors import ConfigError, PlanError, SubspaceError
from safemerge_callback.live import live_factors
from safemerge_callback.subspace import compress_subspace


def reading(name, cosine, interval=None, **more):
    known = {"null_std": 0.25, "reference": 0.5}
    return Reading(name, cosine, 0.75, more.pop("norm", 1.0), 4, (8, 8), interval=interval, **known, **more)


def test_the_interval_must_exclude_the_threshold():
    readings = Readings(
        [
            reading("below", 0.30, (0.28, 0.3499)),
            reading("at its end", 0.30, (0.28, 0.35)),
            reading("across", 0.34, (0.33, 0.36)),
            reading("begins at it", 0.36, (0.35, 0.37)),
            reading("above", 0.40, (0.36, 0.44)),
            reading("exact", 0.35),
            reading("unmoved", 1.0, (1.0, 1.0), norm=0.0),
        ]
    )
    assert undecided(readings, "threshold", threshold=0.35) == ["at its end", "across"]
    assert undecided(readings, "all") == undecided(readings, "watch") == []
    with pytest.raises(ConfigError, match="threshold=2"):
        undecided(readings, "threshold", threshold=2)
    with pytest.raises(PlanError, match=r"2 modules .* leaves gate 'threshold' open, the first is 'at its end'"):
        MergePlan.decide(readings, gate="threshold")
    assert MergePlan.decide(readings, gate="all").certified == (*tuple(readings)[:5], "unmoved")


# Few values, so that ends, cosines and thresholds often coincide.
GRID = st.integers(0, 4).map(lambda i: i / 4)


@given(
    st.lists(st.tuples(GRID, GRID, GRID, GRID, st.booleans(), st.booleans()), min_size=1, max_size=9),
    GRID,
    st.integers(1, 9),
    st.sampled_from([None, 0.0, 0.25]),
)
@settings(max_examples=1500, deadline=None)
def test_decisions_are_those_of_exact_readings(drawn, knob, num_layers, rearm):
    """Whatever the estimates, ties and intervals of one point among them, and only undecided ones read exactly."""
    exact, first = [], []
    for i, (a, b, c, d, compressed, still) in enumerate(drawn):
        low, estimate, true, high = sorted((a, b, c, d))
        true, estimate = (true, estimate) if i % 2 else (estimate, true)
        norm = 0.0 if still else 1.0
        exact.append(reading(f"m{i}", true, norm=norm))
        first.append(reading(f"m{i}", estimate, (low, high), norm=norm) if compressed else exact[-1])
    exact, first = Readings(exact), Readings(first)
    count = min(num_layers, len(exact))
    for gate in gates(knob, count, rearm):
        again = undecided(first, gate)
        settled = Readings(exact[name] if name in again else first[name] for name in first)
        assert undecided(settled, gate) == []
        plans = [MergePlan.decide(r, gate=gate) for r in (settled, exact)]
        assert plans[0].selected == plans[1].selected
        assert above(plans[0]) == above(plans[1])
        if gate.soft:
            assert [plans[0].weights[n] for n in plans[0].selected] == [plans[1].weights[n] for n in plans[1].selected]


def gates(knob, count, rearm):
    yield Gate("threshold", threshold=knob, rearm=rearm if knob + (rearm or 0) <= 1 else None)
    yield Gate("threshold", threshold=knob, soft=True)
    for z in (-4 * knob, 4 * knob):
        yield Gate("calibrated", z_threshold=z, rearm=rearm)
    yield Gate("reference", reference_fraction=max(knob, 0.25), rearm=rearm, soft=True)
    ranked = None if rearm is None else 0.0
    yield Gate("num_layers", num_layers=count, rearm=ranked)
    yield Gate("quantile", quantile=max(knob, 0.25), rearm=ranked)
    yield Gate("gap", rearm=ranked)
    yield Gate("random", threshold=knob, seed=count)
    yield Gate("random", num_layers=count)
    yield from (Gate("all"), Gate("watch"))


def test_the_gap_is_proven_where_no_other_can_be_as_wide():
    ends = [(0.10, 0.12), (0.13, 0.15), (0.60, 0.62), (0.66, 0.68)]
    apart = Readings(reading(f"m{i}", low, (low, high)) for i, (low, high) in enumerate(ends))
    assert undecided(apart, "gap") == []
    assert MergePlan.decide(apart, gate="gap").selected == ("m0", "m1")
    near = Readings(reading(f"m{i}", low, (low, low + 0.3)) for i, (low, _) in enumerate(ends))
    assert undecided(near, "gap") == list(near)


def test_soft_weights_need_the_cosine_of_every_merged_module():
    readings = Readings([reading("a", 0.1, (0.05, 0.15)), reading("b", 0.4, (0.36, 0.44)), reading("c", 0.2)])
    assert undecided(readings, "threshold", soft=True) == ["a"]
    assert undecided(readings, "threshold") == []


def test_rearming_needs_the_cosine_where_the_raised_gate_lies_inside_the_interval():
    readings = Readings([reading("a", 0.1, (0.05, 0.15)), reading("b", 0.4, (0.36, 0.44))])
    assert undecided(readings, "threshold", rearm=0.0) == []
    assert undecided(readings, "threshold", rearm=0.05) == ["b"]


@pytest.fixture(params=["int8", "truncated"])
def case(make_case, tmp_path, request):
    case = make_case("llama")
    rank = {"int8": None, "truncated": 12}[request.param]
    small = compress_subspace(case.subspace, tmp_path / "small.safetensors", request.param, rank, progress=False)
    assert not any(module.exact for module in small.modules.values())
    return case._replace(subspace=small), case.subspace


def test_intervals_hold_the_exact_cosine(case):
    case, exact = case
    factors = live_factors(case.model)
    readings, true = measure(factors, case.subspace, gate="watch"), measure(factors, exact)
    for name, found in readings.items():
        assert found.lower < true[name].cosine < found.upper
        assert found.lower <= found.cosine <= found.upper
        assert found.upper - found.lower < 0.5 or case.subspace.modules[name].kind == "truncated"
        same = {"cosine": true[name].cosine, "interval": None, "signed_cosine": true[name].signed_cosine}
        assert found.signed_cosine is None
        assert dataclasses.replace(found, **same) == true[name]
    assert (true.approximate, readings.approximate) == (False, True)
    assert "known as" in str(readings)
    assert "known as" not in str(true)


def test_every_decision_is_the_exact_measures(case):
    case, exact = case
    factors = live_factors(case.model)
    true = measure(factors, exact)
    ordered = sorted(r.cosine for r in true.values())
    seen = set()
    for tau in [0.0, 0.35, *[(a + b) / 2 for a, b in itertools.pairwise(ordered)], 1.0]:
        plan = MergePlan.decide(measure(factors, case.subspace, gate="threshold", threshold=tau), threshold=tau)
        assert plan.selected == MergePlan.decide(true, threshold=tau).selected
        assert set(plan.certified) ^ set(plan.reread) == set(true)
        for name in plan.reread:
            assert plan.readings[name].cosine == pytest.approx(true[name].cosine, abs=1e-6)
        seen.add(len(plan.reread))
    assert min(seen) == 0
    assert max(seen) > 0
    others = [Gate("gap"), *(Gate("quantile", quantile=q) for q in (0.3, 0.5)), Gate("random", threshold=ordered[1])]
    others += [Gate("calibrated", z_threshold=z) for z in (-3, 0, 3)]
    for knobs in [{"gate": gate} for gate in others]:
        plan = MergePlan.decide(measure(factors, case.subspace, **knobs), **knobs)
        assert plan.selected == MergePlan.decide(true, **knobs).selected
    for k in range(1, len(true) + 1):
        knobs = {"gate": "num_layers", "num_layers": k}
        plan = MergePlan.decide(measure(factors, case.subspace, **knobs), **knobs)
        assert plan.selected == MergePlan.decide(true, **knobs).selected


def test_without_a_gate_every_module_is_read_exactly(case):
    case, exact = case
    assert measure(live_factors(case.model), case.subspace) == measure(live_factors(case.model), exact)


def test_the_exact_file_is_opened_only_where_a_decision_is_open(case):
    case, exact = case
    factors = live_factors(case.model)
    true = measure(factors, exact)
    exact.path.unlink()
    readings = measure(factors, case.subspace, gate="threshold", threshold=0.0)
    assert MergePlan.decide(readings, threshold=0.0).selected == ()
    tau = next(iter(true.values())).cosine
    with pytest.raises(SubspaceError, match="looked for"):
        measure(factors, case.subspace, gate="threshold", threshold=tau)
    with pytest.raises(SubspaceError, match="looked for"):
        measure(factors, case.subspace)


def test_the_host_waits_once_and_once_more_to_read_again(case, host_waits):
    case, exact = case
    factors = live_factors(case.model)
    tau = next(iter(measure(factors, exact).values())).cosine
    with host_waits:
        measure(factors, case.subspace, gate="watch")
    assert host_waits.seen == ["tolist"]
    with host_waits:
        measure(factors, case.subspace, gate="threshold", threshold=tau)
    assert host_waits.seen == ["tolist"] * 3


def test_a_plan_tells_what_was_certified_and_what_was_read_again(case):
    case, exact = case
    factors = live_factors(case.model)
    first = next(iter(measure(factors, exact).values()))
    plan = MergePlan.decide(
        measure(factors, case.subspace, gate="threshold", threshold=first.cosine), threshold=first.cosine
    )
    assert first.name in plan.reread
    text = str(plan)
    assert f"; {len(plan.certified)} certified by interval, {len(plan.reread)} re-read exactly" in text.splitlines()[0]
    for name, verdict in plan.verdicts.items():
        (line,) = [line for line in text.splitlines() if f" {name} " in line]
        assert plan.readings[name].proof in line
        assert ("re-read" if name in plan.reread else "certified: ") in verdict.reason


def test_updates_that_are_zero_or_not_finite_need_no_exact_read(case):
    case, exact = case
    factors = live_factors(case.model)
    exact.path.unlink()
    with torch.no_grad():
        for module in factors.values():
            module.B.zero_()
        factors["layers.0.self_attn.q_proj"].B[0, 0] = torch.nan
    readings = measure(factors, case.subspace, gate="threshold", threshold=1.0)
    assert not readings["layers.0.self_attn.q_proj"].finite
    assert {r.cosine for n, r in readings.items() if n != "layers.0.self_attn.q_proj"} == {1.0}


def test_transposed_modules_have_intervals_too(make_case, tmp_path):
    case = make_case("gpt2", targets=["c_attn", "c_fc"], fan_in_fan_out=True)
    small = compress_subspace(case.subspace, tmp_path / "small.safetensors", progress=False)
    factors = live_factors(case.model)
    assert all(f.transposed for f in factors.values())
    readings, true = measure(factors, small, gate="watch"), measure(factors, case.subspace)
    for name, found in readings.items():
        assert found.lower < true[name].cosine < found.upper < found.lower + 0.5


def test_modules_without_a_matrix_stay_without(make_case, tmp_path):
    case = make_case("llama", equal={"layers.0.self_attn.q_proj"})
    small = compress_subspace(case.subspace, tmp_path / "small.safetensors", progress=False)
    found = measure(live_factors(case.model), small, gate="threshold")["layers.0.self_attn.q_proj"]
    assert (found.cosine, found.comparable, found.interval) == (1.0, False, None)
