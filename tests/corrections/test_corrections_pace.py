"""How often a term comes, and which rows come next."""

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest

from safemerge_callback.corrections.pace import Pace
from safemerge_callback.corrections.row_order import RowOrder, row_order
from safemerge_callback.corrections.schedule import Schedule


def run(pace, steps, needed=lambda step: False, clock=None):
    """The steps of a run at which the term comes."""
    came = []
    for step in range(1, steps + 1):
        if pace.due(step, steps, last=step == steps):
            began = pace.begin()
            if clock:
                clock.now += clock.term
            pace.end(step, steps, began, needed=needed(step))
            came.append(step)
        if clock:
            clock.now += clock.task
    return came


class Clock:
    def __init__(self, term, task):
        self.now, self.term, self.task = 0.0, term, task

    def __call__(self):
        return self.now


def test_every_step_without_more():
    assert run(Pace(Schedule()), 5) == [1, 2, 3, 4, 5]
    assert run(Pace(Schedule(every=2, from_step=3)), 9) == [4, 6, 8]


def test_by_need_the_interval_doubles_up_to_the_longest_and_one_need_brings_it_back():
    assert run(Pace(Schedule(), by_need=True, longest=4), 20) == [1, 3, 7, 11, 15, 19]
    assert run(Pace(Schedule(), by_need=True, longest=8), 20, needed=lambda s: s == 7) == [1, 3, 7, 8, 10, 14]
    assert run(Pace(Schedule(), by_need=True), 4, needed=lambda s: True) == [1, 2, 3, 4]


@pytest.mark.parametrize(("term", "task", "least"), [(0.1, 1.0, 1), (0.3, 1.0, 2), (1.0, 1.0, 6), (2.0, 1.0, 12)])
def test_what_is_too_dear_comes_more_seldom(term, task, least):
    clock = Clock(term, task)
    pace = Pace(Schedule(), max_share=0.15, clock=clock)
    came = run(pace, 120, clock=clock)
    assert pace.least == least
    late = [b - a for a, b in pairwise(came[8:])]
    assert set(late) == {least}
    spent = term / (term + least * task)
    assert spent <= 0.15
    assert least == 1 or term / (term + (least - 1) * task) > 0.15


@pytest.mark.parametrize(("every", "interval"), [(1, 6), (2, 6), (4, 8), (8, 8)])
def test_an_interval_of_the_schedule_counts_towards_the_share(every, interval):
    clock = Clock(1.0, 1.0)
    pace = Pace(Schedule(every=every), max_share=0.15, clock=clock)
    came = run(pace, 200, clock=clock)
    assert {b - a for a, b in pairwise(came[8:])} == {interval}
    assert pace.spacing(200) == interval


def test_the_clock_is_asked_only_while_it_is_measured():
    assert Pace(Schedule(), max_share=0.1, measured=True, clock=lambda: 1 / 0).begin() == 0.0


@pytest.mark.parametrize("by_need", [False, True])
def test_without_a_share_that_it_may_take_no_clock_decides_when_it_comes(by_need):
    quick, slow = (Pace(Schedule(every=2), by_need=by_need, clock=Clock(*pace)) for pace in ((0.0, 1.0), (9.0, 1.0)))
    assert run(quick, 400, clock=quick.clock) == run(slow, 400, clock=slow.clock)
    assert slow.cost.share(1) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("term", "max_share", "steps", "share"),
    [(1.0, None, 200, 0.5), (0.1, None, 2000, None), (1.0, 0.15, 2000, None), (1.0, None, 60, None)],
)
def test_what_is_dear_is_told_where_it_takes_more_than_a_minute(term, max_share, steps, share):
    clock = Clock(term, 1.0)
    pace = Pace(Schedule(), max_share=max_share, clock=clock)
    run(pace, 6, clock=clock)
    assert pace.dear(6, steps) == (share if share is None else pytest.approx(share))
    assert Pace(Schedule()).dear(6, steps) is None


def test_its_state_goes_on_where_it_was():
    one = Pace(Schedule(), by_need=True)
    whole = run(Pace(Schedule(), by_need=True), 30)
    first = run(one, 30)[:2]
    other = Pace(Schedule(), by_need=True)
    began = run(other, 4)
    again = Pace(Schedule(), by_need=True)
    for name, value in other.state().items():
        setattr(again, name, value)
    rest = [
        step for step in range(5, 31) if again.due(step, 30) and again.end(step, 30, 0.0, needed=False) in (True, False)
    ]
    assert first == whole[:2]
    assert began + rest == whole


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_every_row_comes_once_a_pass_whatever_the_ranks(count, ranks):
    orders = [RowOrder(12, seed=4) for _ in range(ranks)]
    alone = RowOrder(12, seed=4)
    drawn = []
    for _ in range(12 // (count * ranks)):
        together = [row for rank, order in enumerate(orders) for row in order.draw(count, rank, ranks)]
        assert together == alone.draw(count * ranks)
        drawn += together
    assert Counter(drawn) == Counter(range(12))
    assert sorted(RowOrder(12, seed=4, drawn=12).draw(12)) == list(range(12))
    assert RowOrder(12, seed=4, drawn=12).draw(12) != drawn
    assert RowOrder(12, seed=5).draw(12) != RowOrder(12, seed=4).draw(12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.67, 0.9])
def test_a_share_of_the_places_is_harmful_rows_and_each_comes_once_a_pass_of_its_kind(share):
    kinds = ["harm"] * 4 + ["benign"] * 7 + ["harm"] * 2
    drawn = row_order(kinds, 3, share).draw(840)
    for count in range(1, 841):
        harmful = sum(kinds[row] == "harm" for row in drawn[:count])
        assert harmful == math.ceil(count * Fraction(str(share)))
    for kind, size in (("harm", 6), ("benign", 7)):
        ones = [row for row in drawn if kinds[row] == kind]
        passes = [ones[at : at + size] for at in range(0, len(ones) - size + 1, size)]
        assert all(len(set(one)) == size for one in passes)
        assert len(set(map(tuple, passes))) > 1


@pytest.mark.parametrize(("share", "only"), [(0.0, "benign"), (1.0, "harm")])
def test_a_share_of_none_or_all_takes_one_kind_alone(share, only):
    kinds = ["harm", "benign", "harm"]
    assert {kinds[row] for row in row_order(kinds, 0, share).draw(20)} == {only}


@pytest.mark.parametrize("kinds", [["harm"] * 3, ["benign"] * 3])
def test_rows_of_one_kind_come_whatever_the_share(kinds):
    assert row_order(kinds, 5, 0.5).draw(6) == row_order(kinds, 5, None).draw(6)


def test_ranks_share_out_an_order_by_kinds_as_one_process_takes_it():
    kinds = ["harm", "benign"] * 5
    alone = row_order(kinds, 2, 0.67).draw(12)
    orders = [row_order(kinds, 2, 0.67) for _ in range(2)]
    assert [row for _ in range(3) for rank in (0, 1) for row in orders[rank].draw(2, rank, 2)] == alone
