import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.decision import GATES, Gate, Reading, Readings, as_gate
from safemerge_callback.errors import ConfigError


def reading(name, cosine, norm=1.0, comparable=True):
    known = {"null_std": 0.05, "reference": 0.6, "signed_cosine": cosine - 0.5}
    return Reading(name, cosine, 0.7, norm, 4, (8, 8), comparable, **known)


def merged(verdicts):
    return {name for name, verdict in verdicts.items() if verdict.merge}


cosines = st.floats(0, 1)
modules = st.lists(st.tuples(cosines, st.sampled_from(["moved", "still", "broken", "equal"])), max_size=12).map(
    lambda rows: Readings(
        reading(
            f"m{i}",
            {"broken": math.nan, "moved": cosine}.get(kind, 1.0),
            0.0 if kind == "still" else 1.0,
            comparable=kind != "equal",
        )
        for i, (cosine, kind) in enumerate(rows)
    )
)


def movable(readings):
    return [n for n, r in readings.items() if r.finite and r.comparable and r.update_norm > 0]


@given(modules, cosines)
def test_threshold_merges_what_moved_and_lies_strictly_below(readings, tau):
    expected = {n for n in movable(readings) if readings[n].cosine < tau}
    assert merged(GATES["threshold"](readings, threshold=tau)) == expected


@given(modules, cosines, cosines)
def test_a_higher_threshold_never_merges_less(readings, one, other):
    low, high = sorted((one, other))
    assert merged(GATES["threshold"](readings, threshold=low)) <= merged(GATES["threshold"](readings, threshold=high))


@given(modules.filter(len), st.data())
def test_num_layers_picks_exactly_the_k_lowest(readings, data):
    k = data.draw(st.integers(1, len(readings)))
    chosen = merged(GATES["num_layers"](readings, num_layers=k))
    candidates = movable(readings)
    assert chosen <= set(candidates)
    assert len(chosen) == min(k, len(candidates))
    left = set(candidates) - chosen
    assert all((readings[c].cosine, c) < (readings[x].cosine, x) for c in chosen for x in left)


@given(modules.filter(len), st.data(), st.randoms())
def test_num_layers_sees_no_order(readings, data, random):
    k = data.draw(st.integers(1, len(readings)))
    shuffled = list(readings.values())
    random.shuffle(shuffled)
    assert merged(GATES["num_layers"](readings, num_layers=k)) == merged(
        GATES["num_layers"](Readings(shuffled), num_layers=k)
    )


@given(modules, st.sampled_from(sorted(GATES)))
def test_every_gate_gives_every_module_a_verdict_with_a_reason_and_spares_the_broken(readings, gate):
    if gate == "num_layers" and not len(readings):
        return
    knobs = {"num_layers": {"num_layers": 1}, "quantile": {"quantile": 0.5}}.get(gate, {})
    for signal in ("safety_slope", "gradient_norm"):
        readings = readings.with_signals({signal: dict.fromkeys(readings, 0.1)})
    verdicts = Gate(gate, **{"threshold": 0.5, **knobs}).verdicts(readings)
    assert list(verdicts) == list(readings)
    for name, verdict in verdicts.items():
        assert verdict.reason
        if not readings[name].finite:
            assert not verdict.merge
            assert "not finite" in verdict.reason


def test_all_merges_also_what_has_not_moved_and_watch_nothing():
    readings = Readings([reading("a", 0.1), reading("b", 1.0, norm=0.0), reading("c", math.nan)])
    assert merged(GATES["all"](readings)) == {"a", "b"}
    assert merged(GATES["watch"](readings)) == set()


def test_reasons_say_what_decided():
    readings = Readings([reading("a", 0.1), reading("b", 0.35), reading("c", 1.0, norm=0.0), reading("d", math.nan)])
    verdicts = GATES["threshold"](readings, threshold=0.35)
    assert [v.reason for v in verdicts.values()] == [
        "cosine 0.1000 < 0.35",
        "cosine 0.35 >= 0.35",
        "has not moved",
        "update is not finite (NaN or infinite)",
    ]
    assert GATES["threshold"](Readings([reading("a", 0.34999999)]), threshold=0.35)["a"].reason == (
        "cosine 0.34999999 < 0.35"
    )
    assert GATES["num_layers"](readings, num_layers=1)["b"].reason == "number 2 of 2 by cosine, not among the 1 lowest"
    apart = GATES["threshold"](Readings([reading("a", 1.0, comparable=False)]), threshold=1.0)["a"]
    assert "aligned and unaligned are equal" in apart.reason


def test_more_layers_than_modules_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="num_layers=3 is more than the 2 "):
        GATES["num_layers"](Readings([reading("a", 0.1), reading("b", 0.2)]), num_layers=3)


@pytest.mark.parametrize(
    ("gate", "threshold", "num_layers", "message"),
    [
        ("treshold", 0.3, None, "'treshold' is unknown.*did you mean 'threshold'"),
        ("threshold", 1.5, None, r"threshold=1\.5.*from 0 to 1"),
        ("threshold", -0.1, None, r"threshold=-0\.1"),
        ("threshold", math.nan, None, "threshold=nan"),
        ("threshold", "0.3", None, "threshold='0.3'"),
        ("threshold", True, None, "threshold=True"),
        ("num_layers", 0.3, None, "num_layers=None.*1 or more"),
        ("num_layers", 0.3, 0, "num_layers=0"),
        ("num_layers", 0.3, 2.0, r"num_layers=2\.0"),
        ("num_layers", 0.3, True, "num_layers=True"),
        ("gap", 0.3, 4, "num_layers=4 is read by"),
        ("random", 0.3, 0, "num_layers=0"),
        ("quantile", 0.3, 4, "num_layers=4 is read by"),
        ("all", 0.3, 4, "num_layers=4 is read by gate 'num_layers' and 'random' only, and gate is 'all'"),
    ],
)
def test_knobs_without_meaning_are_refused(gate, threshold, num_layers, message):
    with pytest.raises(ConfigError, match=message):
        Gate(gate, threshold, num_layers)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"name": "calibrated", "z_threshold": math.inf}, "z_threshold=inf.*finite number of standard deviations"),
        ({"name": "calibrated", "z_threshold": "-2"}, "z_threshold='-2'"),
        ({"name": "reference", "reference_fraction": 0}, r"reference_fraction=0.*above 0 and up to 1"),
        ({"name": "reference", "reference_fraction": 1.2}, r"reference_fraction=1\.2"),
        ({"name": "quantile"}, "quantile=None: gate 'quantile' needs a share"),
        ({"name": "quantile", "quantile": 0.0}, r"quantile=0\.0"),
        ({"name": "quantile", "quantile": True}, "quantile=True"),
        ({"quantile": 0.2}, r"quantile=0\.2 is read by gate 'quantile' only, and gate is 'threshold'"),
        ({"name": "random", "seed": -1}, "seed=-1"),
        ({"name": "random", "seed": 1.0}, r"seed=1\.0"),
        ({"rearm": -0.1}, r"rearm=-0\.1"),
        ({"rearm": math.nan}, "rearm=nan"),
        ({"threshold": 0.95, "rearm": 0.1}, r"rearm=0\.1 above threshold=0\.95 is a cosine over 1"),
        ({"name": "gap", "rearm": 0.1}, "which no cosine lies above: only 0 has a meaning"),
        ({"name": "random", "rearm": 0}, "rearm=0 with gate 'random'.*leave it out"),
        ({"name": "all", "rearm": 0.1}, "leave it out"),
        ({"name": "gap", "soft": True}, "soft=True with gate 'gap'.*calibrated.*reference.*threshold"),
        ({"soft": "yes"}, "soft='yes'"),
        ({"knobs": {"treshold": 1}}, "'treshold' of a gate is unknown; did you mean 'threshold'"),
        ({"knobs": [1]}, "knobs is .1.: map names"),
    ],
)
def test_each_gates_own_knobs_are_refused_by_value(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Gate(**knobs)


def test_a_gate_says_whether_it_asks_for_cosines():
    asks = {name: Gate(name, **{name: 1} if name in ("num_layers", "quantile") else {}).asks_cosines for name in GATES}
    assert {name for name, value in asks.items() if not value} == {"all", "safety_slope", "gradient_norm", "watch"}
    assert not Gate("random", num_layers=1).asks_cosines


def test_a_gate_with_its_knobs_stands_for_both():
    gate = Gate("calibrated", z_threshold=-1)
    assert as_gate(gate, {}) is gate
    assert as_gate("calibrated", {"z_threshold": -1}) == gate
    assert [str(as_gate(*given)) for given in [("gap", {}), ("quantile", {"quantile": 0.25})]] == [
        "gap",
        "quantile 0.25",
    ]
    with pytest.raises(ConfigError, match=r"\['z_threshold'\] were given beside a Gate"):
        as_gate(gate, {"z_threshold": -2})
    with pytest.raises(ConfigError, match="'treshold' of a gate is unknown; did you mean 'threshold'"):
        as_gate("threshold", {"treshold": 0.2})
