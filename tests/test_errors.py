"""What an unknown name is told: the nearest one as a question, and the advice as a sentence that can be read."""

import re
from pathlib import Path

import pytest

from safemerge_callback.decision.gates import as_gate
from safemerge_callback.errors import ConfigError, SafeMergeError, nearest
from safemerge_callback.offline.merge_yaml import read_recipe
from safemerge_callback.subspace.checkpoints.targets import _by_suffix
from safemerge_callback.training.config.settings import SafeMergeConfig
from safemerge_callback.training.config.shorthands import with_preset
from safemerge_callback.training.probe.rules import Stop, as_rule
from safemerge_callback.training.trackers.trackers import known

ROOT = Path(__file__).parent.parent


def recipe_with_a_wrong_key(folder):
    (folder / "merge.yaml").write_text("tresh: 1\nfinetund: a\n")
    return read_recipe(folder / "merge.yaml")


@pytest.mark.parametrize(
    "unknown",
    [
        lambda _: SafeMergeConfig.from_dict({"subspace": "s", "treshold": 0.5}),
        lambda _: with_preset({"preset": "safelor"}),
        lambda _: as_rule(Stop, {"belov": 0.5}),
        lambda _: as_gate("threshold", {"num_layer": 3}),
        lambda _: known(["tensorbord"]),
        lambda _: _by_suffix({"layers.0.q_proj": "layers.0.q_proj.weight"}, ["q_porj"]),
        recipe_with_a_wrong_key,
    ],
)
def test_the_nearest_name_ends_its_sentence(unknown, tmp_path):
    with pytest.raises(SafeMergeError) as error:
        unknown(tmp_path)
    assert re.search(r"did you mean '\w+'\?($| [A-Z])", str(error.value)), error.value
    assert not re.search(r"\?[:.,;]", str(error.value)), error.value


def test_advice_follows_a_colon_where_no_name_is_near():
    assert nearest("xyz", ["threshold"], then="choose one") == ": choose one"
    assert nearest("treshold", ["threshold"], then="choose one") == "; did you mean 'threshold'? Choose one"
    assert nearest("xyz", ["threshold"]) == ""
    with pytest.raises(ConfigError, match=r"setting 'xyz' is unknown: choose among"):
        SafeMergeConfig.from_dict({"subspace": "s", "xyz": 1})


def test_nothing_is_written_behind_the_question_but_by_nearest_itself():
    for folder in ("safemerge_callback", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            # the end of a replacement field, then punctuation or the next literal's
            assert not re.search(r"\bnearest\([^\n]*\)\}\"?\n?\s*f?\"?[:.,]", path.read_text()), path
