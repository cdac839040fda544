"""How much one measure lies above another: Newcombe's intervals, of pairs and of shares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.difference import (
    Estimate,
    difference,
    estimate_of,
    has_interval,
    is_paired,
    share_difference,
)
from safemerge_callback.evaluation.intervals import wilson
from safemerge_callback.evaluation.measure import as_share, share_of

shares = st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_a_difference_is_newcombes():
    """Newcombe 1998, table II: 56/70 against 48/80 has 0.0524 to 0.3339 by method 10."""
    first, second = (Estimate(hits / n, *wilson(hits, n), n) for hits, n in ((56, 70), (48, 80)))
    found = difference(first, second)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)
    assert found.value == pytest.approx(0.2)
    assert found.n == 70


@given(shares, shares)
def test_a_difference_lies_in_its_interval_and_turns_round(left, right):
    one, two = (Estimate(hits / n, *wilson(hits, n), n) for hits, n in (left, right))
    there, back = difference(one, two), difference(two, one)
    assert there.low <= there.value <= there.high
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


@given(st.lists(st.sampled_from(["11", "10", "01", "00", "i1", "1i", "u1", "0u"]), min_size=1, max_size=60))
def test_pairs_turn_round_and_leave_out_what_one_side_did_not_judge(pairs):
    one, two = (share_of("bad_refused", "".join(pair[side] for pair in pairs), "harm") for side in (0, 1))
    judged = [pair for pair in pairs if "u" not in pair]
    assert is_paired(one, two) == bool(judged)
    if judged:
        there, back = share_difference(one, two), share_difference(two, one)
        assert there.n == len(judged)
        assert there.value == pytest.approx(sum((p[0] == "1") - (p[1] == "1") for p in judged) / len(judged))
        assert there.low - 1e-9 <= there.value <= there.high + 1e-9
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_the_same_prompts_are_told_by_digest():
    one, two = (
        share_of("bad_refused", letters, "harm", prompts="a") for letters in ("1" * 20 + "0" * 20, "1" * 21 + "0" * 19)
    )
    assert is_paired(one, two)
    other = {**two, "prompts": "b"}
    assert not is_paired(one, other)
    apart = share_difference(one, other)
    assert apart == difference(estimate_of(one), estimate_of(other))
    assert apart.high - apart.low > share_difference(one, two).high - share_difference(one, two).low
    assert not is_paired(one, share_of("bad_refused", "1" * 41, "harm", prompts="a"))


def test_what_has_no_interval_says_so():
    share = as_share("mine", "task", 0.5, 10, unit="share")
    assert estimate_of(share) == Estimate(0.5, *wilson(5, 10), 10)
    score = as_share("bleu", "task", 36.5, None, 34.0, 39.0)
    assert estimate_of(score) == Estimate(36.5, 34.0, 39.0, 0)
    plain = as_share("bleu", "task", 36.5)
    assert (has_interval(score), has_interval(plain)) == (True, False)
    with pytest.raises(ConfigError, match="'bleu' has no interval"):
        estimate_of(plain)
