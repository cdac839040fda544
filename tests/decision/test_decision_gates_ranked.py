"""Gates that compare modules with each other, and the one that draws them."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.decision import Gate, Reading, Readings
from safemerge_callback.errors import ConfigError


def readings_of(cosines, still=0):
    norms = [1.0] * len(cosines) + [0.0] * still
    rows = zip([*cosines, *[1.0] * still], norms, strict=True)
    return Readings(Reading(f"m{i}", cosine, 0.7, norm, 4, (8, 8)) for i, (cosine, norm) in enumerate(rows))


def merged(gate, readings):
    return {name for name, verdict in gate.verdicts(readings).items() if verdict.merge}


COSINES = st.lists(st.integers(0, 1000).map(lambda i: i / 1000), max_size=12)


@given(st.lists(st.floats(0, 1), max_size=12, unique=True), st.integers(0, 3), st.integers(1, 20))
def test_quantile_takes_the_floor_of_its_share_of_what_has_moved(cosines, still, twentieths):
    readings = readings_of(cosines, still)
    chosen = merged(Gate("quantile", quantile=twentieths / 20), readings)
    assert len(chosen) == twentieths * len(cosines) // 20
    left = {n for n, r in readings.items() if r.update_norm} - chosen
    assert all(readings[c].cosine < readings[x].cosine for c in chosen for x in left)


@given(COSINES, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_larger_share_never_merges_less(cosines, one, other):
    low, high = sorted((one, other))
    readings = readings_of(cosines)
    assert merged(Gate("quantile", quantile=low), readings) <= merged(Gate("quantile", quantile=high), readings)


def test_a_share_is_not_rounded_down_by_binary_fractions():
    readings = readings_of([i / 100 for i in range(100)])
    assert [len(merged(Gate("quantile", quantile=i / 100), readings)) for i in range(1, 101)] == list(range(1, 101))
    assert "number 29 of 100 by cosine, among the lowest 0.29 (29)" in [
        v.reason for v in Gate("quantile", quantile=0.29).verdicts(readings).values()
    ]


@given(COSINES)
def test_gap_parts_the_modules_at_the_widest_step(cosines):
    readings = readings_of(cosines, still=1)
    chosen = merged(Gate("gap"), readings)
    ordered = sorted(cosines)
    steps = [b - a for a, b in itertools.pairwise(ordered)]
    if len(cosines) < 3 or max(steps) == 0:
        assert chosen == set()
        return
    assert 0 < len(chosen) < len(cosines)
    assert len(chosen) == steps.index(max(steps)) + 1
    assert sorted(readings[name].cosine for name in chosen) == ordered[: len(chosen)]


@pytest.mark.parametrize(
    ("cosines", "count", "reason"),
    [
        ([], 0, None),
        ([0.1, 0.9], 0, "2 modules have moved: a gap needs 3"),
        ([0.5, 0.5, 0.5], 0, "all cosines are equal: there is no gap"),
        ([0.125, 0.375, 0.375, 0.625], 1, "number 1 of 4 by cosine, below the largest gap (0.1250 to 0.3750)"),
        ([0.1, 0.2, 0.7, 0.8], 2, "number 1 of 4 by cosine, below the largest gap (0.2000 to 0.7000)"),
    ],
)
def test_gap_is_defined_where_there_is_none(cosines, count, reason):
    verdicts = Gate("gap").verdicts(readings_of(cosines))
    assert sum(v.merge for v in verdicts.values()) == count
    assert not cosines or verdicts["m0"].reason == reason


@given(COSINES, st.floats(0, 1), st.integers(0, 3), st.integers(0, 10**6), st.integers(0, 2))
def test_random_takes_as_many_as_the_threshold_would(cosines, tau, seed, step, still):
    readings = readings_of(cosines, still)
    chosen = merged(Gate("random", threshold=tau, seed=seed, step=step), readings)
    assert len(chosen) == len(merged(Gate("threshold", threshold=tau), readings))
    assert all(readings[name].update_norm for name in chosen)


@given(COSINES.filter(len), st.data(), st.integers(0, 3), st.randoms())
def test_random_takes_num_layers_and_sees_neither_order_nor_cosines(cosines, data, seed, shuffle):
    count = data.draw(st.integers(1, len(cosines)))
    gate = Gate("random", num_layers=count, seed=seed, step=50)
    chosen = merged(gate, readings_of(cosines))
    assert len(chosen) == count
    shuffled = list(readings_of([1 - c for c in cosines]).values())
    shuffle.shuffle(shuffled)
    assert merged(gate, Readings(shuffled)) == chosen


def test_random_draws_every_module_equally_often_and_anew_at_each_step():
    readings, steps = readings_of([i / 10 for i in range(10)]), range(2000)
    draws = [frozenset(merged(Gate("random", num_layers=3, step=step), readings)) for step in steps]
    counts = Counter(name for draw in draws for name in draw)
    spread = math.sqrt(len(steps) * 0.3 * 0.7)
    assert all(abs(count - 600) < 4.5 * spread for count in counts.values())
    assert len(set(draws)) == math.comb(10, 3)
    other = [frozenset(merged(Gate("random", num_layers=3, seed=1, step=step), readings)) for step in steps]
    alike = sum(a == b for a, b in zip(draws, other, strict=True))
    assert abs(alike - len(steps) / 120) < 4.5 * math.sqrt(len(steps) / 120)


def test_reasons_say_how_many_of_how_many_and_why():
    readings = readings_of([0.1, 0.2, 0.9], still=1)
    verdicts = Gate("random", threshold=0.35).verdicts(readings)
    assert {v.reason.partition(": ")[2] for n, v in verdicts.items() if n != "m3"} == {
        "2 of 3 by lot, as many as lie below 0.35"
    }
    assert verdicts["m3"].reason == "has not moved"
    assert all(v.reason.startswith("drawn") == v.merge for v in verdicts.values())
    with pytest.raises(ConfigError, match="num_layers=5 is more than the 4"):
        Gate("random", num_layers=5).verdicts(readings)
