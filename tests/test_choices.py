"""Every place where one name of a few is chosen: any other value is refused in one sentence, whatever its type."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.choices import one_of
from safemerge_callback.decision import Gate, check_merge, check_operator
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.judges.protocol import check_decides
from safemerge_callback.methods import check_majority_sign, get_method
from safemerge_callback.methods.aliases import without_alias
from safemerge_callback.reports.plots import draw_plot
from safemerge_callback.subspace.choice import check_placement
from safemerge_callback.subspace.compress import compress_subspace
from safemerge_callback.training.presets import with_preset
from safemerge_callback.training.trackers.together import known

ASKED = {
    "gate": Gate,
    "method": get_method,
    "combination_type": lambda value: without_alias({"combination_type": value}),
    "preset": lambda value: with_preset({"preset": value}),
    "space": lambda value: check_merge("linear", value, (0.8, 0.2)),
    "operator": lambda value: check_operator("project", value, None),
    "majority_sign_method": lambda value: check_majority_sign("ties", value),
    "decides": check_decides,
    "placement": check_placement,
    "plot": lambda value: draw_plot(None, value),
    "tracker": lambda value: known([value]),
    "kind": lambda value: compress_subspace("s", "o", value),
}


@pytest.mark.parametrize(
    "value", [["all"], {"a": 1}, {1}, 5, True, 10**5000, b"all", "nosuch"], ids=lambda v: str(type(v))
)
@pytest.mark.parametrize("what", ASKED)
def test_what_is_no_such_name_is_refused(what, value):
    with pytest.raises(ConfigError, match="choose one of"):
        ASKED[what](value)


@given(st.one_of(st.text(), st.integers(), st.lists(st.text()), st.none(), st.floats(), st.binary()))
def test_a_name_is_returned_and_all_else_refused(value):
    if value in ("red", "blue"):
        assert one_of(value, ("red", "blue"), "colour") == value
    else:
        with pytest.raises(ConfigError, match="colour"):
            one_of(value, ("red", "blue"), "colour")


def test_the_nearest_name_is_told():
    with pytest.raises(
        ConfigError, match=r"colour 'rod' is unknown: choose one of \['red', 'blue'\]; did you mean 'red'"
    ):
        one_of("rod", ("red", "blue"), "colour")
