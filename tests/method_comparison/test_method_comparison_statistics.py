"""Intervals and fronts against closed forms."""

import math

import numpy as np
import pytest

from method_comparison.drift_measures import correlation_interval, rank_correlation
from method_comparison.statistics import Scored, at_score, front, mean_interval, paired_difference, refusal_at
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import wilson


def test_one_seed_has_wilsons_interval():
    found = mean_interval({3: [1.0] * 30 + [0.0] * 70})
    assert found == (0.3, *wilson(30, 100))


def test_equal_seeds_have_the_interval_of_their_prompts():
    outcomes = [1.0] * 120 + [0.0] * 280
    found = mean_interval(dict.fromkeys(range(5), outcomes))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - half, abs=0.004)
    assert found.high == pytest.approx(0.3 + half, abs=0.004)


def test_seeds_without_spread_over_prompts_have_the_interval_of_their_means():
    # every prompt of a seed alike: the means of 40 seeds, half 0 and half 1
    found = mean_interval({seed: [float(seed % 2)] * 10 for seed in range(40)})
    half = 1.96 * math.sqrt(0.25 / 40)
    assert found.low == pytest.approx(0.5 - half, abs=0.02)
    assert found.high == pytest.approx(0.5 + half, abs=0.02)


def test_what_both_arms_share_cancels():
    rng = np.random.default_rng(1)
    shared = {seed: (rng.random(300) < 0.5).astype(float).tolist() for seed in range(4)}
    assert paired_difference(shared, shared) == (0.0, 0.0, 0.0)
    # one prompt in ten is refused on top, always the same: the interval is that of 30 of 300
    more = {seed: [1.0 if i < 30 else 0.0 for i in range(300)] for seed in range(4)}
    none = {seed: [0.0] * 300 for seed in range(4)}
    found = paired_difference(more, none)
    half = 1.96 * math.sqrt(0.1 * 0.9 / 300)
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - half, abs=0.006)
    assert paired_difference(none, more) == pytest.approx((-0.1, -found.high, -found.low), abs=0.006)


def test_only_seeds_of_both_arms_are_paired():
    x = {1: [1.0, 1.0], 2: [0.0, 0.0]}
    assert paired_difference(x, {1: [0.0, 0.0]}).value == 1.0
    with pytest.raises(ConfigError, match=r"no seed is in both arms: they have \[1, 2\] and \[7\]"):
        paired_difference(x, {7: [0.0, 0.0]})
    with pytest.raises(ConfigError, match="asked 2 and 3 prompts"):
        paired_difference(x, {1: [0.0, 0.0, 1.0]})
    with pytest.raises(ConfigError, match=r"seeds \[1, 2\] were asked \[2, 3\] prompts"):
        mean_interval({1: [1.0, 1.0], 2: [1.0, 1.0, 0.0]})


def test_a_front_holds_what_nothing_beats():
    points = [(0.8, 0.5), (0.7, 0.9), (0.75, 0.4), (0.8, 0.45), (0.9, 0.2), (0.6, 0.9)]
    assert front(points) == [(0.7, 0.9), (0.8, 0.5), (0.9, 0.2)]
    assert front([]) == []


def test_refusals_at_equal_task_score():
    points = [(0.7, 0.9), (0.9, 0.1), (0.65, 0.2)]
    assert refusal_at(points, 0.8) == pytest.approx(0.5)
    assert refusal_at(points, 0.9) == pytest.approx(0.1)
    assert refusal_at(points, 0.7) == refusal_at(points, 0.3) == 0.9
    assert refusal_at(points, 0.91) is None
    assert refusal_at([], 0.5) is None


def test_rank_correlation_sees_order_only_and_shares_ties():
    x = [0.1, 0.2, 0.3, 0.4]
    assert rank_correlation(x, [value**3 for value in x]) == pytest.approx(1.0)
    assert rank_correlation(x, [-value for value in x]) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert rank_correlation([1, 2, 2, 3], x) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert math.isnan(rank_correlation([1, 2], [1, 2]))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_the_interval_of_a_rank_correlation():
    # tanh(atanh(0.5) ± 1.96·√(1.125/97))
    assert correlation_interval(0.5, 100) == pytest.approx((0.3259, 0.6413), abs=1e-4)
    assert correlation_interval(-0.5, 100) == pytest.approx((-0.6413, -0.3259), abs=1e-4)
    # ranks that agree altogether: no spread is known, so no interval is told
    assert all(math.isnan(end) for end in correlation_interval(1.0, 9))
    assert all(math.isnan(end) for end in correlation_interval(math.nextafter(-1.0, 0), 9))
    assert all(math.isnan(end) for end in correlation_interval(0.9, 3))


def shares(task, harm, seeds=(1, 2), prompts=400):
    """An arm whose seeds and prompts all have these shares, the first ones."""
    return Scored(
        *({s: [1.0] * round(x * prompts) + [0.0] * round(prompts - x * prompts) for s in seeds} for x in (task, harm))
    )


def test_an_arm_against_the_front_at_its_own_task_score():
    ends = [shares(0.9, 0.2), shares(0.7, 0.8)]
    # half way between the two: the front refuses 0.5 there
    found = at_score(shares(0.8, 0.6), ends)
    assert found[:4] == ((1, 2), pytest.approx(0.8), pytest.approx(0.6), pytest.approx(0.5))
    assert found.above.value == pytest.approx(0.1)
    assert found.above.low < 0.1 < found.above.high
    assert found.above.high - found.above.low < 0.25
    assert at_score(ends[0], ends).above == pytest.approx((0.0, 0.0, 0.0))
    # above the front's highest score it stays as it is there; below its lowest only its highest refusal is known
    assert at_score(shares(0.95, 0.3), ends).above.value == pytest.approx(0.1)
    assert at_score(shares(0.6, 0.9), ends)[3:] == (pytest.approx(0.8), None)


def test_only_seeds_of_all_arms_count_at_a_score():
    ends = [shares(0.9, 0.2), shares(0.7, 0.8)]
    assert at_score(shares(0.8, 0.6, seeds=(7,)), ends) is None
    one = Scored({1: [1.0], 2: [0.0]}, {1: [1.0], 2: [0.0]})
    found = at_score(one, [Scored({1: [1.0], 3: [0.0]}, {1: [0.0], 3: [1.0]})])
    assert found[:4] == ((1,), 1.0, 1.0, 0.0)


def test_arms_are_redrawn_together_so_that_seeds_which_move_all_of_them_cancel():
    rng = np.random.default_rng(3)
    shifts = {seed: rng.uniform(-0.15, 0.15) for seed in range(8)}

    def moved(task, harm):
        return Scored(
            {s: [1.0] * round((task + x) * 400) + [0.0] * (400 - round((task + x) * 400)) for s, x in shifts.items()},
            {s: [1.0] * round(harm * 400) + [0.0] * (400 - round(harm * 400)) for s in shifts},
        )

    found = at_score(moved(0.7, 0.6), [moved(0.8, 0.2), moved(0.6, 0.8)]).above
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low < 0.25
