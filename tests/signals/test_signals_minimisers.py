"""Minimisers on functions whose least value is known: `golden`, `gradient`, `cma` and `tezo`."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.minimisers import MINIMISERS, Effort, get_minimiser
from safemerge_callback.signals.minimisers.tezo import Directions


class Bowl:
    """Σ weights·(point - least)²; `broken` points have no number for a loss."""

    def __init__(self, least, start=None, shape=None, broken=lambda point: False):
        self.least = least
        self.start = [0.5] * len(least) if start is None else start
        self.shape = shape or (len(least), 1)
        self.broken, self.candidates, self.spent = broken, {}, 0

    def loss(self, point, batch=None):
        self.spent += 1
        value = sum((x - a) ** 2 for x, a in zip(point, self.least, strict=True))
        value = math.inf if self.broken(point) else value
        if batch is None:
            assert all(0.0 <= x <= 1.0 for x in point)
            self.candidates[tuple(point)] = value
        return value

    def gradient(self, point, batch=None):
        slopes = [2 * (x - a) for x, a in zip(point, self.least, strict=True)]
        return self.loss(point, batch), [math.nan] * len(point) if self.broken(point) else slopes

    @property
    def best(self):
        return min(self.candidates, key=self.candidates.get)


def minimised(name, bowl, evaluations=None, seed=0):
    way = get_minimiser(name)
    way.function(bowl, Effort(evaluations or way.evaluations, seed))
    return bowl.best


@settings(max_examples=30, deadline=None)
@given(least=st.floats(-0.5, 1.5))
def test_golden_section_finds_one_number_and_its_borders(least):
    bowl = Bowl([least])
    assert minimised("golden", bowl)[0] == pytest.approx(min(1.0, max(0.0, least)), abs=0.05)
    assert bowl.spent <= MINIMISERS["golden"].evaluations
    if not 0.0 < least < 1.0:
        assert bowl.best[0] in (0.0, 1.0)


def test_golden_section_keeps_away_from_what_is_no_number():
    assert minimised("golden", Bowl([0.9], broken=lambda p: p[0] > 0.5))[0] == pytest.approx(0.5, abs=0.05)
    assert minimised("golden", Bowl([0.9], broken=lambda p: p[0] > 0.0)) == (0.0,)


def test_gradient_finds_many_numbers_and_comes_back_from_a_border():
    least = [0.2, 0.7, 1.4, -0.3]
    best = minimised("gradient", Bowl(least, start=[1.0, 0.0, 0.0, 1.0]), 60)
    assert best == pytest.approx([0.2, 0.7, 1.0, 0.0], abs=0.05)


def test_gradient_stops_where_the_loss_is_no_number():
    bowl = Bowl([0.9, 0.9], start=[0.4, 0.4], broken=lambda p: max(p) > 0.55)
    minimised("gradient", bowl)
    assert bowl.spent < MINIMISERS["gradient"].evaluations


@pytest.mark.parametrize("seed", [0, 1])
def test_tezo_finds_the_numbers_without_a_gradient(seed):
    bowl = Bowl([0.2, 0.7, 0.4, 0.9], shape=(2, 2))
    start = bowl.loss(bowl.start, 0)
    assert bowl.loss(minimised("tezo", bowl, 300, seed), 0) < start / 4
    assert minimised("tezo", Bowl([0.2, 0.7, 0.4, 0.9], shape=(2, 2)), 300, seed) == bowl.best


def test_the_directions_of_tezo_have_the_gradient_for_their_mean():
    """Of a linear loss, over U, V and τ, within 3 standard errors in every entry."""
    slope, generator = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64), torch.Generator().manual_seed(0)
    draws = []
    for _ in range(4000):
        directions = Directions((3, 2), 3, generator)
        direction = directions.along(directions.draw())
        draws.append((slope @ direction) * direction)
    draws = torch.stack(draws)
    errors = (draws.mean(0) - slope).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert errors.max() < 3


def test_cma_finds_the_least_of_a_quadratic():
    pytest.importorskip("cma", reason="the extra `search` is not installed")
    assert minimised("cma", Bowl([0.3, 0.8, 1.3]), 400) == pytest.approx([0.3, 0.8, 1.0], abs=0.02)
    broken = Bowl([0.3, 0.8], broken=lambda p: p[0] > 0.6)
    assert minimised("cma", broken, 300) == pytest.approx([0.3, 0.8], abs=0.05)


def test_cma_names_its_extra_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ConfigError, match=r"safemerge-callback\[search\]"):
        minimised("cma", Bowl([0.3, 0.8]))


def test_an_unknown_minimiser_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"minimiser 'golde' is unknown.*'golden'"):
        get_minimiser("golde")
