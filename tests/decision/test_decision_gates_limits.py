"""Gates that merge below a cosine of each module's own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.decision import Gate, MergePlan, Reading, Readings
from safemerge_callback.errors import ConfigError, SubspaceError


def reading(name, cosine, null=0.7, std=0.05, own=0.6, **more):
    return Reading(name, cosine, null, more.pop("norm", 1.0), 4, (8, 8), null_std=std, reference=own, **more)


def merged(gate, readings):
    return {name for name, verdict in gate.verdicts(readings).items() if verdict.merge}


UNIT = st.floats(0, 1)
MODULES = st.lists(st.tuples(UNIT, UNIT, st.floats(0.001, 0.3), UNIT), max_size=9).map(
    lambda rows: Readings(reading(f"m{i}", *row) for i, row in enumerate(rows))
)


@given(MODULES, st.floats(-30, 30))
def test_calibrated_counts_standard_deviations_from_the_null_value(readings, z):
    chosen = merged(Gate("calibrated", z_threshold=z), readings)
    for name, r in readings.items():
        found = (r.cosine - r.null_cosine) / r.null_std
        if not math.isclose(found, z, abs_tol=1e-9):
            assert (name in chosen) == (found < z)


@given(MODULES, st.floats(0.01, 1))
def test_reference_compares_with_the_safety_adapters_own_cosine(readings, fraction):
    expected = {n for n, r in readings.items() if r.cosine < fraction * r.reference}
    assert merged(Gate("reference", reference_fraction=fraction), readings) == expected


@given(MODULES, st.sampled_from(["calibrated", "reference"]), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_higher_knob_never_merges_less(readings, gate, one, other):
    low, high = sorted((one, other))
    knob = {"calibrated": "z_threshold", "reference": "reference_fraction"}[gate]
    assert merged(Gate(gate, **{knob: low}), readings) <= merged(Gate(gate, **{knob: high}), readings)


@given(MODULES, st.sampled_from(["threshold", "calibrated", "reference"]), st.floats(0.01, 1))
def test_the_limit_is_what_the_verdict_compares_with(readings, gate, knob):
    knobs = {"threshold": "threshold", "calibrated": "z_threshold", "reference": "reference_fraction"}
    rule = Gate(gate, **{knobs[gate]: knob})
    assert merged(rule, readings) == {n for n, r in readings.items() if r.cosine < rule.limit(r)}
    assert all(rule.limit(r, 0.2) >= rule.limit(r) for r in readings.values())


def test_one_z_means_the_same_in_modules_of_other_shape():
    """One cosine does not: 0.6 is low beside 0.94 and high beside 0.52."""
    readings = Readings([reading("wide", 0.6, null=0.94, std=0.02), reading("tall", 0.6, null=0.52, std=0.02)])
    assert merged(Gate("calibrated"), readings) == {"wide"}
    assert merged(Gate("threshold", threshold=0.65), readings) == {"wide", "tall"}


def test_reasons_say_what_decided():
    rows = [reading("a", 0.5, null=0.7, std=0.05, own=0.6), reading("b", 0.6, null=0.7, std=0.05, own=0.6)]
    rows += [reading("c", 1.0, norm=0.0), reading("d", 0.1, std=0.0, own=math.nan), reading("e", math.nan)]
    reasons = {
        gate: [v.reason for v in Gate(gate).verdicts(Readings(rows)).values()] for gate in ("calibrated", "reference")
    }
    assert reasons["calibrated"] == [
        "z -4.0000 < -2: cosine 0.5000, unrelated 0.7000 ± 0.0500",
        "z -1.9999999999999996 >= -2: cosine 0.6000, unrelated 0.7000 ± 0.0500",
        "has not moved",
        "every update has the cosine 0.7000 here: nothing to calibrate by",
        "update is not finite (NaN or infinite)",
    ]
    assert reasons["reference"] == [
        "cosine 0.5000 >= 0.3000, 0.5 of the safety adapter's 0.6000",
        "cosine 0.6000 >= 0.3000, 0.5 of the safety adapter's 0.6000",
        "has not moved",
        "nothing to compare with: the safety adapter has not moved here",
        "update is not finite (NaN or infinite)",
    ]
    (seen,) = Gate("reference").verdicts(Readings([reading("a", 0.2, interval=(0.1, 0.25))])).values()
    assert seen.reason.endswith("(certified: 0.1000 to 0.2500)")


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_what_a_gate_lacks_is_said_before_anything_has_moved(norm):
    with pytest.raises(SubspaceError, match=r"has none \(null_std\) for module 'a': build the subspace again"):
        MergePlan.decide(Readings([reading("a", 0.3, std=None, norm=norm)]), gate="calibrated")
    with pytest.raises(ConfigError, match=r"'reference' compares with the safety adapter's own cosines.*module 'a'"):
        MergePlan.decide(Readings([reading("a", 0.3, own=None, norm=norm)]), gate="reference")


def test_a_module_without_a_matrix_needs_no_spread():
    readings = Readings([reading("a", 1.0, std=None, comparable=False), reading("b", 0.1)])
    assert merged(Gate("calibrated"), readings) == {"b"}
