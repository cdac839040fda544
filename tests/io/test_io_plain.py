"""Values of Python as JSON has them."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from safemerge_callback.io.plain import json_text, plain


class Pair(NamedTuple):
    left: float
    right: tuple[int, ...]


def test_what_json_has_no_word_for_is_said_otherwise():
    value = {
        "path": Path("a/b"),
        3: math.nan,
        "pair": Pair(math.inf, (1, 2)),
        "set": {"b", "a"},
        "no": None,
    }
    found = json.loads(json_text(value))
    assert found == {
        **{"path": "a/b", "3": None, "pair": {"left": None, "right": [1, 2]}, "set": ["a", "b"]},
        "no": None,
    }


def test_anything_else_is_an_error_and_no_text():
    with pytest.raises(TypeError, match="a complex is no value of JSON"):
        plain([1j])
