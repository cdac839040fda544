"""What counts as a number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.errors import shown
from safemerge_callback.io.numbers import is_number, is_whole


@pytest.mark.parametrize("value", [0, -3, 0.5, 1e308, np.float64(0.5), 2**64])
def test_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 10**400, 1j, [1], b"1"])
def test_what_is_no_number(value):
    assert not is_number(value)


@pytest.mark.parametrize(
    ("value", "least", "whole"), [(3, 0, True), (0, 1, False), (True, 0, False), (1.0, 0, False), (2**64, 0, False)]
)
def test_whole_numbers(value, least, whole):
    assert is_whole(value, least) is whole


@given(st.one_of(st.floats(), st.integers(), st.booleans(), st.text(), st.lists(st.integers())))
def test_a_number_is_one_that_a_float_holds(value):
    if is_number(value):
        assert abs(float(value)) < float("inf")


def test_a_value_is_shown_short_whatever_it_is():
    itself = []
    itself.append(itself)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, "x" * 10**6, itself, deep, "a\x1b[31m"):
        assert len(shown(value)) < 200
        assert shown(value).isprintable()
    while deep:  # freed by hand: a list of lists so deep is freed by recursion
        deep = deep.pop()
