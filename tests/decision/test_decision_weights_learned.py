"""The weights rule `learned`: its settings, and the weights that a learned share gives."""

import math
from dataclasses import fields

import pytest

from safemerge_callback.decision import MergePlan, Readings
from safemerge_callback.decision.reading import Reading
from safemerge_callback.decision.weights.learned import SETTINGS
from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.coefficients import SearchSettings

READINGS = Readings(Reading(name, 0.5, 0.5, 1.0, 2, (4, 4)) for name in ("a", "b", "c"))
SHARES = {"learned_share": {"a": 0.25, "b": 0.0, "c": math.nan}}


@pytest.mark.parametrize("method", ["linear", "pull"])
def test_a_share_is_the_weight_of_the_target_and_none_that_is_no_number(method):
    plan = MergePlan.decide(READINGS.with_signals(SHARES), method=method, gate="all", learned="module")
    assert plan.weights == {"a": (0.75, 0.25), "b": (1.0, 0.0), "c": (1.0, 0.0)}
    assert plan.noted == {"learned": {"granularity": "module"}}
    assert "learned by kl, one a module" in plan.words


def test_its_settings_are_those_of_a_search():
    assert set(SETTINGS) == {field.name for field in fields(SearchSettings)}
    settings = {"objective": "cross_entropy", "share": 2.0}
    plan = MergePlan.decide(READINGS.with_signals(SHARES), gate="all", learned=settings)
    assert plan.rules["learned"] == {"granularity": "run", **settings}


def test_readings_without_a_share_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"module 'a' has no learned_share.*safemerge search"):
        MergePlan.decide(READINGS, gate="all", learned="run")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"learned": 3}, "learned is 3: give run, block or module"),
        ({"learned": {"granularty": "run"}}, "setting 'granularty' is unknown; did you mean 'granularity'"),
        ({"learned": "run", "method": "ties", "density": 0.5}, "learned with method 'ties'"),
        ({"learned": "run", "weights": (0.8, 0.1, 0.1)}, "toward one safety adapter or the aligned model"),
    ],
)
def test_what_cannot_be_is_refused(knobs, words):
    with pytest.raises(ConfigError, match=words):
        MergePlan.decide(READINGS.with_signals(SHARES), gate="all", **knobs)
