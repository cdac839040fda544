"""When replayed rows are needed: their mean rise over the last times, by the spreads of their own kind."""

import math
import statistics

import pytest
import torch

from safemerge_callback.corrections.losses import LOSSES
from safemerge_callback.corrections.need import WINDOW, Need, mean_rise, spreads_by_kind
from safemerge_callback.signals.reference import Reference, ReferenceRow

KINDS = ["harm", "harm", "benign", "benign", "harm"]


def reference(*losses):
    empty = torch.zeros(1, 0)
    return Reference(ReferenceRow(empty, None, None, None, loss) for loss in losses)


@pytest.mark.parametrize(("name", "least"), [("ce", (0.2, 0.9)), ("kl", (0.0, 0.0))])
def test_the_spreads_are_of_each_kind_of_its_own(name, least):
    spreads = spreads_by_kind(reference(0.1, 0.2, 0.6, 1.2, 0.3), KINDS, LOSSES[name])
    assert {kind: at for kind, (at, _) in spreads.items()} == pytest.approx(
        dict(zip(("harm", "benign"), least, strict=True))
    )
    assert spreads["harm"][1] == pytest.approx(math.sqrt(0.02 / 3))
    assert spreads["benign"][1] == pytest.approx(0.3)


def test_the_rise_counts_each_row_by_its_own_kind():
    spreads = {"harm": (0.1, 0.2), "benign": (1.0, 0.5)}
    losses = torch.tensor([0.5, 0.1, 2.0])
    assert float(mean_rise(losses, ["harm", "harm", "benign"], spreads)) == pytest.approx((2.0 + 0.0 + 2.0) / 3)
    below = torch.tensor([-1e-7])
    assert float(mean_rise(below, ["harm"], {"harm": (0.0, 0.0)})) == math.inf, "nothing says how much is little"


def test_where_a_kind_is_one_row_the_spread_is_that_of_all():
    spreads = spreads_by_kind(reference(0.1, 0.3, 0.9), ["harm", "harm", "benign"], LOSSES["kl"])
    assert spreads["harm"] == (0.0, pytest.approx(0.1))
    assert spreads["benign"] == (0.0, pytest.approx(statistics.pstdev([0.1, 0.3, 0.9])))


def test_they_are_needed_until_seen_often_enough_and_while_the_mean_of_the_last_is_above():
    need = Need(tolerance=0.2)
    assert [need.observe(0.1) for _ in range(WINDOW)] == [True] * (WINDOW - 1) + [False]
    assert need.observe(0.7), "the mean of four of .1 and one of .7 is .22"
    assert [need.observe(0.1) for _ in range(WINDOW)] == [True] * (WINDOW - 1) + [False]
    assert len(need.recent) == WINDOW


@pytest.mark.parametrize("rise", [math.nan, math.inf])
def test_what_is_no_number_is_a_need(rise):
    need = Need(tolerance=100.0, recent=[0.0] * WINDOW)
    assert need.observe(rise)
