"""Rows that begin alike: what a model says of them is the same, however their beginning is paid for."""

import pytest
import torch

from safemerge_callback.signals.row_batch import row_batch, row_outputs
from safemerge_callback.signals.rows import RowTokens
from safemerge_callback.signals.shared_prefix import prefix_agrees, prefix_length, prefixed_outputs

BEGIN = tuple(range(3, 15))
ROWS = [
    RowTokens((*BEGIN, 20, 21, 22), (30, 31, 32), "harm"),
    RowTokens((*BEGIN, 23), (33,), "benign"),
    RowTokens((*BEGIN, 20, 25), (34, 35), "benign"),
]


@pytest.fixture
def model(world):
    return world.model(init_lora_weights=False).eval()


def test_the_outputs_and_their_gradient_are_those_of_whole_rows(model):
    assert prefix_length(model, ROWS) == len(BEGIN)
    assert prefix_agrees(model, ROWS, len(BEGIN), "cpu")
    gradients = []
    for length in (0, len(BEGIN)):
        if length:
            outputs, batch = prefixed_outputs(model, ROWS, length, "cpu")
        else:
            batch = row_batch(ROWS)
            outputs = row_outputs(model, batch)
        said = outputs.logits[batch.mask].log_softmax(-1)
        loss = said.gather(-1, batch.targets[batch.mask].unsqueeze(-1)).sum()
        wanted = [p for n, p in model.named_parameters() if "lora_" in n]
        gradients.append([said.detach(), *torch.autograd.grad(loss, wanted)])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_too_short_or_not_alike_is_left_as_it_is(model):
    assert prefix_length(model, ROWS[:1]) == 0
    assert prefix_length(model, [row._replace(prompt=row.prompt[8:]) for row in ROWS]) == 0
    # One prompt is the beginning itself: a token of it stays behind.
    assert prefix_length(model, [*ROWS, RowTokens(BEGIN, (5,), "harm")]) == len(BEGIN) - 1
    assert prefix_length(torch.nn.Linear(2, 2), ROWS) == 0


def test_a_model_that_speaks_otherwise_behind_a_cache_is_found_out(model, monkeypatch):
    forward = model.get_base_model().forward

    def deaf(*args, past_key_values=None, **more):
        return forward(*args, past_key_values=None if more["input_ids"].shape[0] > 1 else past_key_values, **more)

    def refusing(*args, past_key_values=None, **more):
        raise TypeError("no cache")

    for broken in (deaf, refusing):
        monkeypatch.setattr(model.get_base_model(), "forward", broken)
        assert not prefix_agrees(model, ROWS, len(BEGIN), "cpu")
