import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import wilson
from safemerge_callback.evaluation.intervals import paired

binomtest = pytest.importorskip("scipy.stats", reason="scipy is not installed").binomtest


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_is_that_of_scipy(counts, confidence):
    successes, n = counts
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_paired_is_newcombes():
    """The paper's first example: 36, 12, 2 and 0 pairs."""
    assert paired(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


counts = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


@given(counts)
def test_a_paired_difference_lies_in_its_interval_and_turns_round(four):
    both, first, second, neither = four
    low, high = paired(*four)
    assert low - 1e-12 <= (first - second) / sum(four) <= high + 1e-12
    assert paired(both, second, first, neither) == pytest.approx((-high, -low), abs=1e-12)


def test_no_trial_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n", "confidence"), [(-1, 5, 0.95), (6, 5, 0.95), (1, 5, 0.0), (1, 5, 1.0)])
def test_impossible_counts_and_confidences_are_refused(successes, n, confidence):
    with pytest.raises(ConfigError, match=f"{successes} of {n} at confidence {confidence}"):
        wilson(successes, n, confidence)


def test_the_floor_loads_neither_torch_nor_transformers():
    code = "import sys, safemerge_callback.evaluation; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_interval_holds_its_share_also_at_the_ends():
    for n in range(1, 200):
        for hits in {0, 1, n // 2, n}:
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1
