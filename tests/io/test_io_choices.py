"""Every place where one name of a few is chosen: any other value is refused in one sentence, whatever its type."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from safemerge_callback import SafeMergeConfig, build_subspace, merge_adapters
from safemerge_callback.cli import app
from safemerge_callback.decision import Gate
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.judges.protocol import check_decides
from safemerge_callback.io.choices import one_of, truth
from safemerge_callback.methods import How, check_merge, get_method
from safemerge_callback.methods.aliases import without_alias
from safemerge_callback.reports.plots import draw_plot
from safemerge_callback.subspace.compress import compress_subspace
from safemerge_callback.subspace.placement import check_placement
from safemerge_callback.training.config.shorthands import with_preset
from safemerge_callback.training.trackers.trackers import known

# Nothing is drawn of it: the choice is refused before.
ANY: Any = None
ASKED = {
    "gate": Gate,
    "method": get_method,
    "combination_type": lambda value: without_alias({"combination_type": value}),
    "preset": lambda value: with_preset({"preset": value}),
    "space": lambda value: check_merge("linear", value, (0.8, 0.2)),
    "operator": lambda value: How("project", knobs={"operator": value}),
    "majority_sign_method": lambda value: How("ties", knobs={"density": 0.5, "majority_sign_method": value}),
    "decides": check_decides,
    "placement": check_placement,
    "plot": lambda value: draw_plot(ANY, value),
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


@pytest.mark.parametrize("value", ["false", "no", "true", 0, 1, 1.0, None, []])
@pytest.mark.parametrize(
    "asked",
    [
        lambda value: truth(value, "x"),
        lambda value: merge_adapters("a", "b", "s", "out", overwrite=value),
        lambda value: build_subspace("out", aligned="a", unaligned="b", common_rows=value),
        lambda value: build_subspace("out", aligned="a", unaligned="b", progress=value),
        lambda value: SafeMergeConfig("s", "a", at_train_end=value),
        lambda value: Gate(soft=value),
    ],
    ids=["itself", "overwrite", "common_rows", "progress", "callback", "gate"],
)
def test_a_text_or_a_number_is_no_truth_value(tmp_path, monkeypatch, asked, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="true"):
        asked(value)
    assert list(tmp_path.iterdir()) == []


def test_truth_values_are_taken():
    assert [truth(value, "x") for value in (True, False)] == [True, False]


def test_force_in_a_merges_file_is_true_or_false(tmp_path, monkeypatch):
    """The text "false" would have counted as true, and replaced a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yaml").write_text('finetuned: a\nsafety: b\nsubspace: s\nforce: "false"\n')
    result = CliRunner().invoke(app, ["merge", "--config", "m.yaml", "-o", "out"])
    assert (result.exit_code, "overwrite is 'false': give true or false" in result.stderr) == (2, True)
