"""The gate that asks which way an update points."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.decision import Gate, MergePlan, Reading, Readings, measure
from safemerge_callback.errors import ConfigError, SubspaceError
from safemerge_callback.live import live_factors
from safemerge_callback.subspace import compress_subspace


def reading(name, signed, norm=1.0, comparable=True, cosine=0.5, **more):
    return Reading(name, cosine, 0.7, norm, 4, (8, 8), comparable, signed_cosine=signed, **more)


@given(st.lists(st.floats(-1, 1), max_size=9), st.floats(-8, 8))
def test_it_merges_below_so_many_standard_deviations(signed, z):
    readings = Readings(reading(f"m{i}", value) for i, value in enumerate(signed))
    verdicts = Gate("opposed", z_threshold=z).verdicts(readings)
    # 1/√(8·8) is one standard deviation
    assert [v.merge for v in verdicts.values()] == [8 * value < z for value in signed]


def test_its_default_and_its_words():
    readings = Readings([reading("a", -0.5), reading("b", -0.25), reading("c", 0.125)])
    plan = MergePlan.decide(readings, gate="opposed")
    assert plan.selected == ("a",)
    assert plan.verdicts["a"].reason == "z -4.0000 < -2: signed cosine -0.5000, unrelated 0"
    assert plan.verdicts["b"].reason == "z -2.0 >= -2: signed cosine -0.2500, unrelated 0"
    assert plan.gate.knob == -2.0
    with pytest.raises(ConfigError, match="z_threshold=nan: give a finite number"):
        Gate("opposed", z_threshold=math.nan)
    with pytest.raises(ConfigError, match="soft=True with gate 'opposed'"):
        Gate("opposed", soft=True)
    with pytest.raises(ConfigError, match=r"rearm=0\.5 with gate 'opposed'"):
        Gate("opposed", rearm=0.5)


def test_modules_that_no_cosine_decides_are_left_alone():
    still = reading("still", None, norm=0.0, cosine=1.0)
    equal = reading("equal", None, comparable=False, cosine=1.0)
    broken = reading("broken", None, norm=math.nan, cosine=math.nan)
    verdicts = Gate("opposed").verdicts(Readings([still, equal, broken]))
    assert not any(v.merge for v in verdicts.values())
    with pytest.raises(SubspaceError, match="gate 'opposed' needs the signed cosine, and module 'a' was read from"):
        Gate("opposed").verdicts(Readings([reading("a", None, interval=(0.4, 0.6))]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_readings_hold_the_dense_signed_cosine(make_case, family):
    case = make_case(family, **({"targets": ["c_attn", "c_fc"], "fan_in_fan_out": True} if family == "gpt2" else {}))
    factors = live_factors(case.model)
    readings = measure(factors, case.subspace)
    for name, f in factors.items():
        V, update = case.V[name].double(), f.scaling * f.B.detach().double() @ f.A.detach().double()
        expected = float((V * update).sum() / (V.norm() * update.norm()))
        assert readings[name].signed_cosine == pytest.approx(expected, abs=1e-6)
        assert readings[name].signed_z == pytest.approx(expected * (V.shape[0] * V.shape[1]) ** 0.5, abs=1e-4)


def test_a_negative_scaling_turns_the_sign_and_nothing_else(make_case):
    case = make_case("llama")
    factors = live_factors(case.model)
    other = measure({n: replace(f, scaling=-f.scaling) for n, f in factors.items()}, case.subspace)
    for name, found in measure(factors, case.subspace).items():
        assert other[name].signed_cosine == -found.signed_cosine != 0
        assert other[name].cosine == found.cosine


def test_a_compressed_V_has_no_sign_and_the_gate_reads_the_exact_one(make_case):
    case = make_case("llama")
    factors = live_factors(case.model)
    small = compress_subspace(case.subspace, case.subspace.path.with_name("small.safetensors"), progress=False)
    with torch.no_grad():
        exact = measure(factors, case.subspace)
        assert {r.signed_cosine for r in measure(factors, small, gate="threshold").values() if r.interval} == {None}
        found = measure(factors, small, gate="opposed", z_threshold=0.0)
    assert {n: r.signed_cosine for n, r in found.items()} == {n: r.signed_cosine for n, r in exact.items()}
    plans = [MergePlan.decide(r, gate="opposed", z_threshold=0.0) for r in (found, exact)]
    assert plans[0].selected == plans[1].selected
    assert 0 < len(plans[0].selected) < len(factors)
