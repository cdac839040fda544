"""A knob is checked by its owner, and refused by whoever does not read it."""

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.io.knobs import Knob, checked, refuse_idle, unknown_knob


def _number(value, beside):
    if not isinstance(value, int):
        raise ConfigError(f"size is {value!r}: give a whole number")
    return value + beside.get("first", 0)


FIRST, SIZE = Knob("first", "One.", _number, default=1), Knob("size", "Another.", _number, default=2)


def test_each_is_checked_in_order_with_what_stands_before_it():
    assert checked((FIRST, SIZE), {}) == {"first": 1, "size": 3}
    assert checked((FIRST, SIZE), {"size": 7, "other": None}) == {"first": 1, "size": 8}
    with pytest.raises(ConfigError, match="size is 'x'"):
        checked((SIZE,), {"size": "x"})


def test_one_that_says_something_to_a_stranger_is_refused():
    refuse_idle(SIZE, 2, "method", "linear", ["ties"])
    with pytest.raises(ConfigError, match="size is 5, which method 'linear' does not read: leave it out, or choose"):
        refuse_idle(SIZE, 5, "method", "linear", ["ties"])
    with pytest.raises(ConfigError, match=r"choose one of \['a', 'b'\]"):
        refuse_idle(SIZE, 5, "method", "linear", ["a", "b"])
    with pytest.raises(ConfigError, match="size is 'x': give a whole number"):
        refuse_idle(SIZE, "x", "method", "linear", ["ties"])


def test_one_that_nobody_has_declared_is_refused_with_the_nearest():
    assert "knob 'siez' of a merge is unknown; did you mean 'size'" in str(unknown_knob("siez", ("size",), "a merge"))
