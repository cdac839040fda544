"""The rows that a run was trained on last, as they passed."""

import gc

import torch

from safemerge_callback.signals.rows import RowTokens
from safemerge_callback.signals.task_rows import LONGEST, Passed, TaskRows, rows_of, whole_batch


def batch(ids, mask=None, labels=None, positions=None):
    return Passed(*(None if x is None else torch.tensor(x) for x in (ids, mask, labels, positions)))


def pairs(rows):
    return [(row.prompt, row.response) for row in rows]


def test_the_response_is_what_the_loss_counts():
    labels = [[-100, -100, 6, 7], [-100, 4, -100, -100]]
    rows = rows_of(batch([[4, 5, 6, 7], [3, 4, 9, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]], labels))
    assert pairs(rows) == [((4, 5), (6, 7)), ((3,), (4,))]
    assert {row.kind for row in rows} == {"task"}
    # between two answers; padding on the left; nothing counted
    labels = [[-100, 5, -100, 7], [-100, -100, -100, 9], [-100] * 4]
    rows = rows_of(batch([[4, 5, 6, 7], [0, 0, 8, 9], [4, 5, 6, 7]], [[1] * 4, [0, 0, 1, 1], [1] * 4], labels))
    assert pairs(rows) == [((4,), (5, 6, 7)), ((8,), (9,))]
    assert pairs(rows_of(batch([[4, 5, 6]]))) == [((4,), (5, 6))]


def test_rows_that_are_packed_are_told_apart():
    rows = rows_of(batch([[4, 5, 6, 7, 8]], labels=[[-100, 5, -100, -100, 8]], positions=[[0, 1, 0, 1, 2]]))
    assert pairs(rows) == [((4,), (5,)), ((6, 7), (8,))]


def test_a_long_row_is_cut_around_where_the_response_begins():
    ids = list(range(1000))
    labels = [-100] * 600 + ids[600:]
    (row,) = rows_of(batch([ids], labels=[labels]))
    assert row.response == tuple(ids[600:856])
    assert row.prompt == tuple(ids[600 - (LONGEST - 256) : 600])


class Model(torch.nn.Module):
    def forward(self, input_ids=None, **inputs):
        return input_ids


def seen(rows, ids, model=None, **inputs):
    model = model or Model()
    rows.follow(model)
    model(input_ids=torch.tensor(ids), **inputs)
    return rows.rows()


def test_the_last_ones_are_kept_of_training_batches_alone():
    rows, model = TaskRows(3), Model()
    rows.follow(model)
    for first in range(4):
        model(input_ids=torch.tensor([[first, 9], [first + 10, 9]]))
    with torch.no_grad():
        model(input_ids=torch.tensor([[50, 9]]))
    with rows.unseen():
        model(input_ids=torch.tensor([[51, 9]]))
    model.eval()(input_ids=torch.tensor([[52, 9]]))
    model.train()(input_ids=torch.tensor([[53, 9]]), pixel_values=torch.ones(1))
    assert [row.prompt for row in rows.rows()] == [(12,), (3,), (13,)]
    assert len(rows.batches) == 2
    # they are no views of what the trainer may write into
    ids = torch.tensor([[7, 8]])
    model(ids)
    ids.zero_()
    assert pairs(rows.rows())[-1] == ((7,), (8,))


def test_what_a_checkpoint_had_comes_before_what_was_seen_since():
    earlier = tuple(RowTokens((i,), (1,), "task") for i in range(3))
    rows = TaskRows(3, earlier)
    assert rows.rows() == earlier
    assert [row.prompt for row in seen(rows, [[9, 1]])] == [(1,), (2,), (9,)]


def test_a_model_keeps_nothing_of_a_run_that_is_over():
    model, rows = Model(), TaskRows(2)
    rows.follow(model)
    del rows
    gc.collect()
    assert model(input_ids=torch.tensor([[1, 2]])).shape == (1, 2)


def test_a_trainer_that_gives_its_model_less_shows_the_batch_itself():
    model, rows = Model(), TaskRows(3)
    rows.follow(model)
    ids = torch.tensor([[4, 5, 6, 7]])
    with whole_batch(model, {"input_ids": ids, "labels": torch.tensor([[-100, -100, 6, 7]])}):
        model(input_ids=ids[:, :2])
        model(input_ids=ids[:, 2:], past_key_values="those of the first two")
    assert pairs(rows.rows()) == [((4, 5), (6, 7))]
    model(input_ids=ids[:, 2:], past_key_values="those of the first two")
    assert len(rows.rows()) == 1
    with torch.no_grad(), whole_batch(model, {"input_ids": ids}):
        model(input_ids=ids)
    assert len(rows.rows()) == 1
    with whole_batch(Model(), {"input_ids": ids}):
        pass
